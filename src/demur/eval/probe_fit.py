"""Fit, calibrate and measure a probe that tells harmful prompts from others, on what was read of them once.

Logistic regression on standardised inputs. The penalty is chosen, the probability calibrated (Platt 1999) and the
threshold set on out-of-fold predictions: no prompt is predicted by a fit that has seen it or its twin. What comes out
is one weight vector and bias on the inputs as they are, with everything folded in.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from demur.errors import InputError
from demur.eval.statistics import clopper_pearson
from demur.steering.probe import Attention
from demur.types import Estimate

Kind = Literal["harmful", "lookalike", "benign"]
"""Of a prompt: to be refused, harmless but looking harmful, or plainly harmless."""
Floats = NDArray[np.float64]
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Values of scikit-learn's C that are tried: smaller is simpler."""
FOLDS = 5
_BINS = 10
_RESAMPLES = 1_000


class Fit(NamedTuple):
    """A fitted probe."""

    weight: Floats
    """[d]; with `attention` [units, heads]."""
    bias: float
    penalty: float | None
    """The chosen C; of an attention probe none."""
    out_of_fold: Floats
    """[n] probability of each prompt by a fit that has not seen it."""
    auroc: float
    """Out of fold, harmful against look-alikes and benign prompts, each of the three kinds counting alike in all."""
    attention: Attention | None = None


class Split(NamedTuple):
    """What a fit is made and judged on."""

    harmful: NDArray[np.bool_]
    """[n]"""
    weights: Floats
    """[n] as `weights_of` gives them."""
    folds: list[tuple[NDArray[np.int64], NDArray[np.int64]]]
    """Of each fold the rows to train on and those to predict."""


def split(kinds: Sequence[Kind], groups: Sequence[Hashable], seed: int) -> Split:
    """Folds in which prompts of one group stay together. Raises `InputError` with fewer than `FOLDS` groups of harmful
    or of other prompts."""
    from sklearn.model_selection import StratifiedGroupKFold

    harmful = np.array([kind == "harmful" for kind in kinds])
    number = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    group = np.array([number[one] for one in groups])
    for what, chosen in (("harmful", harmful), ("harmless", ~harmful)):
        if len(set(group[chosen])) < FOLDS:
            raise InputError(
                f"{len(set(group[chosen]))} different {what} prompts were given to train on; give at least {FOLDS}"
            )
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(harmful, harmful, group)
    return Split(harmful, weights_of(kinds), list(folds))


def calibrated(logits: Floats, plan: Split) -> tuple[float, float, Floats]:
    """Slope and offset by which out-of-fold `logits` [n] become log-odds (Platt), and the probabilities [n]."""
    from sklearn.linear_model import LogisticRegression

    platt = LogisticRegression(C=1e6, max_iter=2_000).fit(logits[:, None], plan.harmful, sample_weight=plan.weights)
    slope, offset = float(platt.coef_[0, 0]), float(platt.intercept_[0])
    return slope, offset, _sigmoid(slope * logits + offset)


def weighted_auroc(logits: Floats, plan: Split) -> float:
    """Of out-of-fold logits, the kinds weighted as in the fit."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(plan.harmful, logits, sample_weight=plan.weights))


def fit_probe(x: Floats, kinds: Sequence[Kind], groups: Sequence[Hashable], seed: int = 0) -> Fit:
    """Fit on inputs `x` [n, d]; prompts of one group (twins, or one prompt under several system prompts) stay together.

    Half of the weight is on harmful prompts, and a quarter on each other kind, however many there are of each. Raises
    `InputError` with fewer than `FOLDS` groups of harmful or of other prompts.
    """
    from sklearn.linear_model import LogisticRegression

    plan = split(kinds, groups, seed)
    harmful, weights, folds = plan
    center, scale = _standard(x, weights)
    z = (x - center) / scale
    best: tuple[float, float, Floats] | None = None
    for penalty in PENALTIES:
        logits = np.empty(len(z))
        for train, test in folds:
            model = LogisticRegression(C=penalty, max_iter=2_000)
            model.fit(z[train], harmful[train], sample_weight=weights[train])
            logits[test] = model.decision_function(z[test])
        auroc = weighted_auroc(logits, plan)
        if best is None or auroc > best[0]:
            best = auroc, penalty, logits
    assert best is not None
    auroc, penalty, logits = best
    model = LogisticRegression(C=penalty, max_iter=2_000).fit(z, harmful, sample_weight=weights)
    # fitted to predictions that the slope cannot have seen
    slope, offset, out_of_fold = calibrated(logits, plan)
    weight = model.coef_[0] / scale
    bias = float(model.intercept_[0] - center @ weight)
    return Fit(slope * weight, slope * bias + offset, penalty, out_of_fold, auroc)


def weights_of(kinds: Sequence[Kind]) -> Floats:
    """[n] by which each kind counts as `fit_probe` says; the mean is 1."""
    share = {"harmful": 0.5, "lookalike": 0.25, "benign": 0.25}
    present = {kind: kinds.count(kind) for kind in set(kinds)}
    other = sum(share[kind] for kind in present if kind != "harmful")
    each = {
        kind: (share[kind] if kind == "harmful" else 0.5 * share[kind] / other) * len(kinds) / count
        for kind, count in present.items()
    }
    return np.array([each[kind] for kind in kinds])


def _standard(x: Floats, weights: Floats) -> tuple[Floats, Floats]:
    center = np.average(x, axis=0, weights=weights)
    scale = np.sqrt(np.average((x - center) ** 2, axis=0, weights=weights))
    return center, np.maximum(scale, 1e-6 * float(scale.max() or 1))


def _sigmoid(logits: Floats) -> Floats:
    found: Floats = 1 / (1 + np.exp(-np.clip(logits, -700, 700)))
    return found


def threshold_for(probabilities: Sequence[float], kinds: Sequence[Kind], allowed: dict[Kind, float]) -> float:
    """The lowest threshold at which of each kind no larger share than `allowed` exceeds it.

    Raises `InputError` where a kind has too few prompts for its share to be told from none (1 / share).
    """
    found = 0.0
    for kind, share in allowed.items():
        mine = sorted((p for p, one in zip(probabilities, kinds, strict=True) if one == kind), reverse=True)
        if not mine:
            continue
        may = math.floor(share * len(mine) + 1e-9)
        if may == 0:
            raise InputError(
                f"a false-alarm rate of {share:g} needs at least {math.ceil(1 / share)} {kind} prompts to be set on, "
                f"but there are {len(mine)}; give more, or allow a larger rate"
            )
        if may < len(mine):
            found = max(found, mine[may])
    return min(found, 1.0)


def alarm_rate(probabilities: Sequence[float], threshold: float) -> Estimate:
    """Share of probabilities above the threshold, with its Clopper-Pearson interval."""
    n = len(probabilities)
    k = sum(p > threshold for p in probabilities)
    interval = clopper_pearson(k, n)
    return Estimate(k / n if n else math.nan, interval.low, interval.high, n)


def auroc(harmful: Sequence[float], other: Sequence[float], seed: int = 0) -> Estimate:
    """Share of (harmful, other) pairs that are ordered rightly, ties counting half, with a bootstrap interval over
    prompts of both sides."""
    a, b = np.sort(np.asarray(other, dtype=float)), np.asarray(harmful, dtype=float)
    if not len(a) or not len(b):
        return Estimate(math.nan, math.nan, math.nan, 0)
    draw = np.random.default_rng(seed)

    def of(low: Floats, high: Floats) -> float:
        below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
        return float(below.mean() / (2 * len(low)))

    draws = [of(np.sort(draw.choice(a, len(a))), draw.choice(b, len(b))) for _ in range(_RESAMPLES)]
    low, high = (float(q) for q in np.quantile(draws, (0.025, 0.975)))
    return Estimate(of(a, b), low, high, len(a) + len(b))


class Bin(NamedTuple):
    """One step of a calibration curve."""

    low: float
    high: float
    """Edges of the predicted probability."""
    predicted: float
    """Weighted mean."""
    harmful: float
    """Weighted share of prompts that are harmful."""
    n: int


def calibration(probabilities: Sequence[float], kinds: Sequence[Kind]) -> list[Bin]:
    """How often prompts of each predicted probability are harmful, ten bins of equal width, kinds weighted as in
    `fit_probe`; empty bins are left out."""
    p, weights = np.asarray(probabilities), weights_of(kinds)
    harmful = np.array([kind == "harmful" for kind in kinds])
    place = np.minimum((p * _BINS).astype(int), _BINS - 1)
    found = []
    for i in range(_BINS):
        if (here := place == i).any():
            w = weights[here]
            mean, share = float(np.average(p[here], weights=w)), float(np.average(harmful[here], weights=w))
            found.append(Bin(i / _BINS, (i + 1) / _BINS, mean, share, int(here.sum())))
    return found
