"""Rates, paired differences and their intervals. Formulas are ours, checked against scipy in the tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from demur.types import Rate

_Z = 1.959963984540054
"""Normal quantile of a two-sided 95 % interval."""


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


def bootstrap_mean(values: Sequence[float], seed: int = 0, resamples: int = 10_000) -> Interval:
    """Mean of `values` with a percentile bootstrap interval over them, e.g. one value per prompt.

    For a paired difference of two runs, give the differences prompt by prompt. NaN for no values.
    """
    if not values:
        return Interval(math.nan, math.nan, math.nan)
    data = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(data), (resamples, len(data)))
    means = data[draws].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(data.mean()), float(low), float(high))


def bootstrap_ratio(above: Sequence[float], below: Sequence[float], seed: int = 0, resamples: int = 10_000) -> Interval:
    """Mean of `above` per mean of `below`, each resampled by itself, being of different prompts. NaN for none."""
    if not above or not below:
        return Interval(math.nan, math.nan, math.nan)
    draw = np.random.default_rng(seed)
    means = [
        np.asarray(values, dtype=np.float64)[draw.integers(0, len(values), (resamples, len(values)))].mean(axis=1)
        for values in (above, below)
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.nanquantile(means[0] / means[1], [0.025, 0.975])
        value = np.float64(np.mean(above)) / np.float64(np.mean(below))
    return Interval(float(value), float(low), float(high))


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar p for paired yes/no outcomes, from the numbers of discordant pairs."""
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, float(2 * tail / 2**n))
