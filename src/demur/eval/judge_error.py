"""How often a judge is wrong, and what that does to a rate it reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from demur.errors import InputError
from demur.eval.statistics import Interval, rate
from demur.types import Rate

_RESAMPLES = 10_000
_UNKNOWN = Interval(math.nan, math.nan, math.nan)


class Confusion(NamedTuple):
    """What a judge said of answers whose label is known; positive is what it looks for, e.g. a refusal."""

    tp: int
    fp: int
    tn: int
    fn: int
    unscored: int
    """Answers the judge could not label; in none of the figures below."""

    @property
    def n(self) -> int:
        """Answers the judge labelled."""
        return self.tp + self.fp + self.tn + self.fn

    @property
    def accuracy(self) -> Rate:
        """Labelled right, of `n`."""
        return rate(self.tp + self.tn, self.n)

    @property
    def sensitivity(self) -> Rate:
        """Found, of the positive that it labelled."""
        return rate(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> Rate:
        """Passed, of the negative that it labelled."""
        return rate(self.tn, self.tn + self.fp)

    @property
    def kappa(self) -> float:
        """Cohen's kappa: agreement beyond chance, 1 at most. NaN for no answers or where all labels are the same."""
        return float(_kappa([self.tp, self.fp, self.tn, self.fn]))


def confusion(gold: Sequence[bool], said: Sequence[bool | None]) -> Confusion:
    """Count a judge's labels against the known ones, answer by answer; None is an answer it could not label.

    Raises `InputError` when there are not equally many of each.
    """
    if len(gold) != len(said):
        raise InputError(
            f"{len(gold)} known labels and {len(said)} of the judge were given, expected one of each for every answer; "
            "put None where the judge could not label it"
        )
    cells = Counter(zip(gold, said, strict=True))
    return Confusion(
        tp=cells[True, True],
        fp=cells[False, True],
        tn=cells[False, False],
        fn=cells[True, False],
        unscored=cells[True, None] + cells[False, None],
    )


def kappa_interval(gold: Sequence[bool], said: Sequence[bool | None], seed: int = 0) -> Interval:
    """Cohen's kappa with a 95 % percentile bootstrap interval over the labelled answers. NaN where kappa is.

    Perfect agreement gives [1, 1] however few the answers: quote accuracy and its interval beside it.
    """
    table = confusion(gold, said)
    value = table.kappa
    if math.isnan(value):
        return _UNKNOWN
    # drawing n answers anew is drawing how many fall into each cell
    shares = np.array([table.tp, table.fp, table.tn, table.fn]) / table.n
    kappas = _kappa(np.random.default_rng(seed).multinomial(table.n, shares, _RESAMPLES))
    low, high = np.nanquantile(kappas, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def _kappa(cells: ArrayLike) -> NDArray[np.float64]:
    """Kappa of tables [..., 4] of tp, fp, tn and fn: [...]. NaN where chance alone agrees always."""
    tp, fp, tn, fn = np.moveaxis(np.asarray(cells, dtype=np.float64), -1, 0)
    n = tp + fp + tn + fn
    chance = (tp + fn) * (tp + fp) + (tn + fp) * (tn + fn)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((n * (tp + tn) - chance) / (n * n - chance))


def rogan_gladen(observed: Rate, sensitivity: Rate, specificity: Rate, seed: int = 0) -> Interval:
    """The share that a perfect judge would have found, from the share that this one did: (p + sp - 1) / (se + sp - 1).

    Rogan & Gladen 1978, Am. J. Epidemiol. 107:71, cut to [0, 1]. The interval carries the uncertainty of all three
    rates: each is drawn 10,000 times from its posterior under Jeffreys' prior, Beta(k + 1/2, n - k + 1/2), and the
    middle 95 % of the results are kept, with the estimate in it (Brown, Cai & DasGupta 2001, Statist. Sci. 16:101, for
    one rate). A draw in which the judge tells nothing stands for 0 as often as for 1. In simulations of 50 to 1,000
    answers and as many labels it covers the truth 95 % of the time, 92 % in the worst corners. The answers must be like
    those that sensitivity and specificity were measured on; [0, 0] or [1, 1] shows that they are not.

    NaN where a rate has no observations or the judge is no better than chance, se + sp <= 1.
    """
    better = sensitivity.value + specificity.value - 1
    if observed.n == 0 or not better > 0:
        return _UNKNOWN
    value = min(1.0, max(0.0, (observed.value + specificity.value - 1) / better))
    draw = np.random.default_rng(seed)
    p, se, sp = (draw.beta(r.k + 0.5, r.n - r.k + 0.5, _RESAMPLES) for r in (observed, sensitivity, specificity))
    told = se + sp > 1
    shares = np.arange(_RESAMPLES) % 2.0
    shares[told] = np.clip((p + sp - 1)[told] / (se + sp - 1)[told], 0.0, 1.0)
    low, high = np.quantile(shares, [0.025, 0.975])
    return Interval(value, min(value, float(low)), max(value, float(high)))
