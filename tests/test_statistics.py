"""Our formulas against scipy, on random tables."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from demur.eval.statistics import bootstrap_mean, mcnemar_p, rate


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval(table: tuple[int, int]) -> None:
    k, n = table
    ours = rate(k, n)
    theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1 or ours.value in (0, 1)


def test_no_observation_says_nothing() -> None:
    empty = rate(0, 0)
    assert (empty.low, empty.high) == (0, 1)
    assert math.isnan(empty.value)


@given(st.integers(0, 60), st.integers(0, 60))
def test_exact_mcnemar(b: int, c: int) -> None:
    theirs = stats.binomtest(min(b, c), b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar_p(b, c) == pytest.approx(theirs, rel=1e-9)


@settings(max_examples=10)
@given(st.lists(st.sampled_from([-100.0, 0.0, 100.0]), min_size=10, max_size=60), st.integers(0, 3))
def test_bootstrap_of_the_mean(values: list[float], seed: int) -> None:
    ours = bootstrap_mean(values, seed)
    assert ours == bootstrap_mean(values, seed)
    assert ours.value == pytest.approx(np.mean(values))
    assert ours.low <= ours.value <= ours.high
    if len(set(values)) > 1:
        theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, random_state=1)
        width = theirs.confidence_interval.high - theirs.confidence_interval.low
        assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.15 * width)
        assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.15 * width)
