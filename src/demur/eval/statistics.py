"""Rates, paired differences and their intervals. Formulas are ours, checked against scipy and others in the tests.

Differences are second minus first, so less than 0 is a loss. What a judge's errors do is in `judge_error`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import beta, norm

from demur.errors import InputError
from demur.types import Rate

_Z = 1.959963984540054
"""Normal quantile of a two-sided 95 % interval."""
_RESAMPLES = 10_000


def rate(k: int, n: int) -> Rate:
    """`k` of `n` with the Wilson 95 % interval (never Wald: 0 of 50 is not exactly 0). [0, 1] for n = 0."""
    if n == 0:
        return Rate(0, 0, 0.0, 1.0)
    p, z2 = k / n, _Z * _Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Rate(k, n, max(0.0, centre - half), min(1.0, centre + half))


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


_UNKNOWN = Interval(math.nan, math.nan, math.nan)


def clopper_pearson(k: int, n: int, level: float = 0.95) -> Interval:
    """`k` of `n` with the exact interval, which covers the truth at least `level` of the time, whatever it is.

    Wider than Wilson's; for claims that must hold, such as none of n. [0, 1] for n = 0.
    """
    if n == 0:
        return Interval(math.nan, 0.0, 1.0)
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0
    return Interval(k / n, low, high)


def _resamples(n: int, resamples: int, draw: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Indices [some, n] of `resamples` resamples of n things; in parts, as those of all MMLU fill a gigabyte."""
    rows = max(1, 2**22 // n)
    for start in range(0, resamples, rows):
        yield draw.integers(0, n, (min(rows, resamples - start), n))


def _resampled_means(values: Sequence[float], resamples: int, draw: np.random.Generator) -> NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    return np.concatenate([data[rows].mean(axis=1) for rows in _resamples(len(data), resamples, draw)])


def _mean(values: Sequence[float]) -> float:
    return float(np.asarray(values, dtype=np.float64).mean())


def _percentiles(value: float, draws: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def bootstrap_mean(values: Sequence[float], seed: int = 0, resamples: int = _RESAMPLES) -> Interval:
    """Mean of `values` with a percentile bootstrap interval over them, e.g. one value per prompt.

    For a paired difference of two runs, give the differences prompt by prompt. NaN for no values.
    """
    if not values:
        return _UNKNOWN
    return _percentiles(_mean(values), _resampled_means(values, resamples, np.random.default_rng(seed)))


def bootstrap_ratio(
    above: Sequence[float], below: Sequence[float], seed: int = 0, resamples: int = _RESAMPLES
) -> Interval:
    """Mean of `above` per mean of `below`, each resampled by itself, being of different prompts. NaN for none."""
    if not above or not below:
        return _UNKNOWN
    draw = np.random.default_rng(seed)
    means = [_resampled_means(values, resamples, draw) for values in (above, below)]
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.nanquantile(means[0] / means[1], [0.025, 0.975])
        value = np.float64(np.mean(above)) / np.float64(np.mean(below))
    return Interval(float(value), float(low), float(high))


def bootstrap_paired_ratio(
    above: Sequence[float], below: Sequence[float], seed: int = 0, resamples: int = _RESAMPLES
) -> Interval:
    """Mean of `above` per mean of `below`, both of the same prompts, which are resampled together. NaN for none.

    Raises `InputError` when they are not of equally many prompts.
    """
    _same_length(above, below, "values above and below")
    if not above:
        return _UNKNOWN
    pairs = np.asarray([above, below], dtype=np.float64)
    draw = np.random.default_rng(seed)
    means = np.concatenate([pairs[:, rows].mean(axis=2) for rows in _resamples(len(above), resamples, draw)], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.quantile(means[0] / means[1], [0.025, 0.975])
        value = pairs[0].mean() / pairs[1].mean()
    return Interval(float(value), float(low), float(high))


class ClusterMean(NamedTuple):
    """A mean of observations that come in clusters."""

    mean: Interval
    """Over all observations; its interval is NaN for fewer than two clusters."""
    n: int
    """Observations."""
    clusters: int
    """What the interval rests on; with a handful it is too narrow, so say how many."""


def cluster_bootstrap(
    values: Sequence[float], clusters: Sequence[Hashable], seed: int = 0, resamples: int = _RESAMPLES
) -> ClusterMean:
    """Mean of `values` with a percentile interval by resampling whole clusters: objectives, not the chats on each.

    `clusters` names the cluster of each value. (Field & Welsh 2007, J. R. Stat. Soc. B 69:369, cluster bootstrap.)
    """
    _same_length(values, clusters, "values and clusters")
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    if not names:
        return ClusterMean(_UNKNOWN, 0, 0)
    member = [names[name] for name in clusters]
    sizes = np.bincount(member)
    sums = np.bincount(member, weights=np.asarray(values, dtype=np.float64))
    mean = float(sums.sum() / sizes.sum())
    if len(names) < 2:
        return ClusterMean(Interval(mean, math.nan, math.nan), len(values), len(names))
    draw = np.random.default_rng(seed)
    parts = [sums[rows].sum(axis=1) / sizes[rows].sum(axis=1) for rows in _resamples(len(names), resamples, draw)]
    return ClusterMean(_percentiles(mean, np.concatenate(parts)), len(values), len(names))


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar p for paired yes/no outcomes, from the numbers of discordant pairs."""
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, float(2 * tail / 2**n))


class Paired(NamedTuple):
    """Two runs compared on the same prompts, by one yes/no outcome. Shares are fractions."""

    n: int
    """Pairs with both sides scored."""
    left_out: int
    """Pairs with an unscored side; in none of the figures."""
    base: Rate
    """Yes in the first run, of `n`."""
    steered: Rate
    """Yes in the second run, of `n`."""
    difference: Interval
    """`steered` minus `base`; Newcombe's interval, the one to quote. To claim that nothing was lost where hardly any
    pair differs it is too narrow: see `non_inferiority`."""
    bootstrap: Interval
    """The same by paired bootstrap; [0, 0] when nothing differs, however few prompts that was seen on."""
    only_first: int
    """Pairs with yes in the first run only."""
    only_second: int
    """Pairs with yes in the second run only."""
    p: float
    """Exact two-sided McNemar."""


def paired(before: Sequence[bool | None], after: Sequence[bool | None], seed: int = 0) -> Paired:
    """Compare two runs prompt by prompt; None is an outcome that could not be scored.

    Raises `InputError` when the runs are not of equally many prompts.
    """
    _same_length(before, after, "outcomes before and after")
    table = Counter((a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None)
    n, only_first, only_second = table.total(), table[True, False], table[False, True]
    return Paired(
        n=n,
        left_out=len(before) - n,
        base=rate(table[True, True] + only_first, n),
        steered=rate(table[True, True] + only_second, n),
        difference=_newcombe(table[True, True], only_first, only_second, table[False, False]),
        bootstrap=_flip_bootstrap(only_first, only_second, n, seed),
        only_first=only_first,
        only_second=only_second,
        p=mcnemar_p(only_first, only_second),
    )


def _newcombe(both: int, only_first: int, only_second: int, neither: int) -> Interval:
    """Second minus first of two paired proportions, by squaring and adding the distances to their Wilson limits.

    Newcombe 1998, Statist. Med. 17:2635, method 10: phi is corrected for continuity where it is positive.
    """
    n = both + only_first + only_second + neither
    if n == 0:
        return _UNKNOWN
    first, second = rate(both + only_first, n), rate(both + only_second, n)
    margins = first.k * (n - first.k) * second.k * (n - second.k)
    odds = both * neither - only_first * only_second
    phi = (max(odds - n / 2, 0.0) if odds > 0 else odds) / math.sqrt(margins) if margins else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(a * a - 2 * phi * a * b + b * b)

    value = (only_second - only_first) / n
    low = value - distance(second.value - second.low, first.high - first.value)
    high = value + distance(second.high - second.value, first.value - first.low)
    return Interval(value, max(-1.0, low), min(1.0, high))


def _flip_bootstrap(only_first: int, only_second: int, n: int, seed: int) -> Interval:
    """Paired bootstrap of second minus first: drawing n pairs anew is drawing how many flip each way."""
    if n == 0:
        return _UNKNOWN
    shares = np.array([only_second, only_first, n - only_first - only_second]) / n
    flips = np.random.default_rng(seed).multinomial(n, shares, _RESAMPLES)
    return _percentiles((only_second - only_first) / n, (flips[:, 0] - flips[:, 1]) / n)


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted for being several comparisons, in the given order (Holm 1979, Scand. J. Statist. 6:65).

    Raises `InputError` for a p that is no probability.
    """
    for p in ps:
        if not 0 <= p <= 1:
            raise InputError(f"a p value of {p} was given, expected 0 to 1; leave out comparisons that have none")
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


class NonInferiority(NamedTuple):
    """Whether a loss is at most a margin, which "p > 0.05" never shows."""

    margin: float
    n: int
    difference: Interval
    """Mean of the differences. Its lower end is the one-sided 97.5 % bound that decides."""
    p: float
    """One-sided, of the loss being `margin` or more."""
    kept: bool
    """Whether the interval lies above -`margin`."""


def non_inferiority(differences: Sequence[float], margin: float, seed: int = 0) -> NonInferiority:
    """Is the mean of `differences` (steered minus base, one for each item, higher is better) above -`margin`?

    One-sided at 2.5 %, the usual level, so that the decision is read off the two-sided 95 % interval (ICH E9, 5.5).

    Right/wrong outcomes, differences of -1, 0 and 1: score interval and test of Tango 1998, Statist. Med. 17:891, which
    keeps its error rate better than the plain one (Liu et al. 2002, Statist. Med. 21:231). A bootstrap fails where few
    pairs differ: of identical answers it makes [0, 0]. Tango's interval is then -+z^2 / (n + z^2), Wilson's for 0 of n:
    50 equal answers do not rule out a loss of 7 points, 1,000 do not rule out one of 0.38. Newcombe's leans on the two
    rates and claims as little as half of that. Exactly reckoned for 50 to 1,000 pairs and margins of 1 to 10 points, a
    loss of the margin passes in 2.6 % of runs at most; by Newcombe's interval, in up to 8.6 %. `margin` is a fraction
    here: 0.02 for two points.

    Any other differences: percentile bootstrap of the mean, and for p the share of resamples at or below -`margin`,
    with one added to both counts. Good for 20 items or more. NaN where all are the same, as nothing tells the spread.

    Not kept, with NaN, for no items. Raises `InputError` for a margin that makes no sense.
    """
    binary = {-1.0, 0.0, 1.0}.issuperset(differences)
    if not 0 < margin < (1 if binary else math.inf):
        raise InputError(
            f"margin {margin} was given, expected {'a fraction between 0 and 1' if binary else 'a number above 0'}: "
            "the largest loss that still counts as kept, in the unit of the differences (0.02 is two points)"
        )
    n = len(differences)
    if n == 0:
        return NonInferiority(margin, 0, _UNKNOWN, math.nan, False)
    if binary:
        gains, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
        high = -_tango_low(losses, gains, n)
        interval = Interval((gains - losses) / n, _tango_low(gains, losses, n), high)
        p = float(norm.sf(_tango_z(gains, losses, n, -margin)))
    elif min(differences) == max(differences):
        interval, p = Interval(differences[0], math.nan, math.nan), math.nan
    else:
        means = _resampled_means(differences, _RESAMPLES, np.random.default_rng(seed))
        interval = _percentiles(_mean(differences), means)
        p = (1 + int((means <= -margin).sum())) / (1 + _RESAMPLES)
    return NonInferiority(margin, n, interval, p, interval.low > -margin)


def _tango_z(gains: int, losses: int, n: int, difference: float) -> float:
    """Score statistic of a true `difference` between -1 and 1, about normal; 0 at the observed one."""
    b = difference * (2 * n + losses - gains) - (gains + losses)
    c = -losses * difference * (1 - difference)
    lost = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (
        4 * n
    )  # most likely share of losses, were `difference` the truth
    variance = n * (2 * lost + difference * (1 - difference))
    return (gains - losses - n * difference) / math.sqrt(variance)


def _tango_low(gains: int, losses: int, n: int) -> float:
    if losses == n:
        return -1.0
    step = 1e-12  # the statistic is 0 / 0 at -1, and at 0 when nothing differs
    return float(brentq(lambda d: _tango_z(gains, losses, n, d) - _Z, -1 + step, (gains - losses) / n - step))


def detectable_difference(n: int, discordance: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest difference of two paired proportions that McNemar's test finds with `power`, as a fraction.

    `discordance` is the share of pairs that differ. Solves n d^2 = (z_alpha/2 sqrt(psi) + z_power sqrt(psi - d^2))^2
    (Connor 1987, Biometrics 43:207). No difference is larger than the discordance it is made of, so where d would
    be, psi is d: all flips go one way. The exact test wants a little more where few pairs flip. NaN where no
    difference is found, which is below n = 4. Raises `InputError` for shares out of range.
    """
    if n < 1 or not (0 < discordance <= 1 and 0 < alpha < 1 and alpha < power < 1):
        raise InputError(
            f"n {n}, discordance {discordance}, power {power} and alpha {alpha} were given, expected at least one "
            "pair, fractions between 0 and 1, and a power above alpha"
        )
    z_alpha, z_power = float(norm.isf(alpha / 2)), float(norm.ppf(power))

    def missing(d: float) -> float:
        psi = max(discordance, d)
        return z_alpha * math.sqrt(psi) + z_power * math.sqrt(psi - d * d) - math.sqrt(n) * d

    return float(brentq(missing, 0.0, 1.0)) if missing(1.0) <= 0 else math.nan


def _same_length(first: Sequence[object], second: Sequence[object], what: str) -> None:
    if len(first) != len(second):
        raise InputError(
            f"{what} were given for {len(first)} and {len(second)} items, expected one of each for every item; "
            "put None where something could not be scored"
        )


_FLIPS = 20
"""Clusters up to which all ways to flip their signs are counted."""


def sign_flip_p(values: Sequence[float], clusters: Sequence[Hashable], seed: int = 0) -> float:
    """Two-sided p of the mean of paired differences being 0, by flipping the sign of whole clusters.

    Exact where there are at most 20 clusters, else by as many random flips as there are resamples elsewhere. Two
    clusters that point the same way give 0.5, six 0.03: with few clusters little can be shown. 1 for no values.
    (Fisher's randomisation test: were the sides alike, exchanging them in all pairs of a cluster would change nothing.)
    """
    _same_length(values, clusters, "values and clusters")
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    sums = np.bincount([names[name] for name in clusters], weights=np.asarray(values, np.float64), minlength=1)
    sums = sums[sums != 0]  # these have the same sum whichever way they are turned
    if not len(sums):
        return 1.0
    observed = abs(sums.sum()) - 1e-9
    if len(sums) <= _FLIPS:
        totals = np.zeros(1)
        for one in sums:
            totals = np.concatenate([totals + one, totals - one])
        return float((np.abs(totals) >= observed).mean())
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (_RESAMPLES, len(sums)))
    return float((1 + (np.abs(signs @ sums) >= observed).sum()) / (1 + _RESAMPLES))
