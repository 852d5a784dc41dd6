"""Our formulas against scipy, statsmodels, scikit-learn and published examples, on random tables."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from demur.errors import InputError
from demur.eval.judge_error import confusion, kappa_interval, rogan_gladen
from demur.eval.statistics import (
    Paired,
    bootstrap_mean,
    clopper_pearson,
    cluster_bootstrap,
    detectable_difference,
    holm,
    mcnemar_p,
    non_inferiority,
    paired,
    rate,
)

shares = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
tables = st.tuples(*[st.integers(0, 40)] * 4).filter(any)


def compare(both: int, only_first: int, only_second: int, neither: int) -> Paired:
    cells = ((True, True), (True, False), (False, True), (False, False))
    table = zip(cells, (both, only_first, only_second, neither), strict=True)
    pairs = [pair for pair, count in table for _ in range(count)]
    return paired([a for a, _ in pairs], [b for _, b in pairs])


def flips(gains: int, losses: int, n: int) -> list[float]:
    return [1.0] * gains + [-1.0] * losses + [0.0] * (n - gains - losses)


@given(shares)
def test_wilson_interval(table: tuple[int, int]) -> None:
    k, n = table
    ours = rate(k, n)
    theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1 or ours.value in (0, 1)


@given(shares, st.sampled_from([0.9, 0.95, 0.99]))
def test_exact_interval(table: tuple[int, int], level: float) -> None:
    k, n = table
    ours = clopper_pearson(k, n, level)
    assert ours[1:] == pytest.approx(proportion_confint(k, n, alpha=1 - level, method="beta"), abs=1e-12)
    assert ours.low <= ours.value <= ours.high


def test_no_observation_says_nothing() -> None:
    empty = rate(0, 0)
    assert (empty.low, empty.high) == (0, 1)
    assert math.isnan(empty.value)
    assert clopper_pearson(0, 0)[1:] == (0, 1)
    nothing = paired([], [])
    assert (nothing.n, nothing.base, nothing.p) == (0, rate(0, 0), 1)
    judge = confusion([], [])
    intervals = (
        *(nothing.difference, nothing.bootstrap, bootstrap_mean([]), cluster_bootstrap([], []).mean),
        *(non_inferiority([], 0.02).difference, kappa_interval([], []), rogan_gladen(empty, rate(9, 9), rate(9, 9))),
    )
    assert all(math.isnan(end) for interval in intervals for end in interval)
    assert math.isnan(judge.kappa)
    assert not non_inferiority([], 0.02).kept
    assert holm([]) == []


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


def test_drawing_in_parts_is_drawing_at_once() -> None:
    values = np.random.default_rng(5).normal(size=1500)
    at_once = values[np.random.default_rng(7).integers(0, 1500, (10_000, 1500))].mean(axis=1)
    assert bootstrap_mean(values.tolist(), 7)[1:] == pytest.approx(np.quantile(at_once, [0.025, 0.975]), abs=1e-12)


@pytest.mark.parametrize(
    ("table", "newcombe", "tango"),
    [
        # airway hyper-responsiveness before and after stem cell transplantation: Fagerland, Lydersen & Laake 2014,
        # Statist. Med. 33:2850, tables II and V; there first minus second
        ((1, 1, 7, 12), (0.026, 0.507), (0.026, 0.517)),
        # response before and after consolidation therapy: Fagerland et al. 2017, Statistical Analysis of Contingency
        # Tables, chapter 8
        ((59, 6, 16, 80), (0.0046, 0.1186), (0.0054, 0.1240)),
    ],
)
def test_published_paired_intervals(
    table: tuple[int, int, int, int], newcombe: tuple[float, float], tango: tuple[float, float]
) -> None:
    _, lost, gained, _ = table
    digits = 5e-4 if table[0] == 1 else 5e-5
    assert compare(*table).difference[1:] == pytest.approx(newcombe, abs=digits)
    assert non_inferiority(flips(gained, lost, sum(table)), 0.02).difference[1:] == pytest.approx(tango, abs=digits)


@settings(deadline=None)
@given(tables)
def test_paired_comparison(table: tuple[int, int, int, int]) -> None:
    both, lost, gained, neither = table
    n = sum(table)
    ours = compare(*table)
    assert (ours.n, ours.left_out, ours.only_first, ours.only_second) == (n, 0, lost, gained)
    assert (ours.base, ours.steered) == (rate(both + lost, n), rate(both + gained, n))
    assert ours.p == pytest.approx(
        mcnemar([[both, lost], [gained, neither]], exact=True).pvalue if lost + gained else 1
    )
    assert -1 <= ours.difference.low <= ours.difference.value <= ours.difference.high <= 1
    assert ours.difference.value == ours.bootstrap.value == pytest.approx(ours.steered.value - ours.base.value)
    low, high = bootstrap_mean(flips(gained, lost, n), seed=1)[1:]
    assert ours.bootstrap[1:] == pytest.approx((low, high), abs=0.1 * (high - low) + 1.5 / n)
    for other in (compare(both, gained, lost, neither), compare(neither, gained, lost, both)):  # runs, or yes and no
        value, low, high = other.difference
        assert ours.difference == pytest.approx((-value, -high, -low), abs=1e-12)


def test_pairs_with_an_unscored_side_are_left_out_and_counted() -> None:
    before = [True, None, True, False, None, False]
    after = [True, True, False, None, None, True]
    scored = paired([True, True, False], [True, False, True])
    assert paired(before, after) == scored._replace(left_out=3)
    with pytest.raises(InputError, match="for 6 and 5 items"):
        paired(before, after[:5])


def multinomial(n: int, shares: Sequence[float]) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every table of n in as many cells as `shares`, with its probability."""
    law = stats.multinomial(n, shares)
    cells = np.indices((n + 1,) * (len(shares) - 1)).reshape(len(shares) - 1, -1).T
    cells = cells[cells.sum(axis=1) <= n]
    whole = np.column_stack([cells, n - cells.sum(axis=1)])
    likely = law.pmf(whole)
    for row, p in zip(whole[likely > 1e-9].tolist(), likely[likely > 1e-9], strict=True):
        yield tuple(row), float(p)


@pytest.mark.parametrize("shares", [(0.5, 0.1, 0.1, 0.3), (0.55, 0.15, 0.02, 0.28), (0.02, 0.01, 0.1, 0.87)])
def test_newcombe_covers_the_truth(shares: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demur.eval.statistics._RESAMPLES", 1)
    covered = 0.0
    for table, p in multinomial(24, shares):
        ours = compare(*table).difference
        covered += p * (ours.low <= shares[2] - shares[1] <= ours.high)
    assert 0.93 <= covered <= 0.995


@pytest.mark.parametrize(("margin", "gains"), [(0.05, 0.0), (0.05, 0.02), (0.05, 0.1), (0.1, 0.0), (0.1, 0.2)])
def test_non_inferiority_rarely_passes_a_loss_of_the_margin(margin: float, gains: float) -> None:
    """Exactly, over all outcomes of 80 pairs; 2.5 % is the aim."""
    losses = gains + margin
    passed = sum(
        p * non_inferiority(flips(up, down, 80), margin).kept
        for (up, down, _), p in multinomial(80, (gains, losses, 1 - gains - losses))
    )
    assert passed <= 0.026


@settings(deadline=None)
@given(st.integers(1, 200), st.data())
def test_non_inferiority_of_right_and_wrong(n: int, data: st.DataObject) -> None:
    gains = data.draw(st.integers(0, n))
    losses = data.draw(st.integers(0, n - gains))
    ours = non_inferiority(flips(gains, losses, n), 0.1)
    assert -1 <= ours.difference.low <= ours.difference.value <= ours.difference.high <= 1
    assert ours.kept == (ours.difference.low > -0.1) == (ours.p < 0.025)
    value, low, high = non_inferiority(flips(losses, gains, n), 0.1).difference
    assert ours.difference == pytest.approx((-value, -high, -low), abs=1e-9)
    if gains == losses == 0:
        assert ours.difference.high == pytest.approx(rate(0, n).high)


def test_identical_answers_are_kept_only_when_there_are_enough() -> None:
    assert not non_inferiority([0.0] * 50, 0.02).kept
    assert non_inferiority([0.0] * 1000, 0.02).kept
    assert non_inferiority([0] * 1000, 0.02) == non_inferiority([0.0] * 1000, 0.02)
    with pytest.raises(InputError, match="expected a fraction between 0 and 1"):
        non_inferiority([0.0] * 1000, 2)  # points


def test_non_inferiority_of_scores() -> None:
    draw = np.random.default_rng(1)
    for loss, kept in ((0.0, True), (0.35, False), (1.0, False)):
        scores = draw.normal(-loss, 1, 200).tolist()
        ours = non_inferiority(scores, 0.5, seed=2)
        assert ours.difference == bootstrap_mean(scores, seed=2)
        assert ours.kept == kept == (ours.p < 0.025)
        t = stats.ttest_1samp(scores, -0.5, alternative="greater").pvalue
        assert ours.p == pytest.approx(t, abs=0.01)
    same = non_inferiority([0.3] * 40, 0.5)
    assert math.isnan(same.difference.low)
    assert not same.kept
    with pytest.raises(InputError, match="a number above 0"):
        non_inferiority([0.3, 0.4], 0)


def test_clusters_are_resampled_whole() -> None:
    draw = np.random.default_rng(3)
    clusters = draw.integers(0, 12, 150).tolist()
    values = [float(draw.random() < 0.2 + 0.05 * c) for c in clusters]
    groups = [[v for v, c in zip(values, clusters, strict=True) if c == name] for name in dict.fromkeys(clusters)]
    slow = []
    for picks in np.random.default_rng(9).integers(0, len(groups), (2000, len(groups))):
        slow.append(np.mean([v for pick in picks for v in groups[pick]]))
    ours = cluster_bootstrap(values, clusters, seed=9, resamples=2000)
    assert (ours.n, ours.clusters) == (150, 12)
    assert ours.mean == pytest.approx((np.mean(values), *np.quantile(slow, [0.025, 0.975])))

    alone = cluster_bootstrap(values, [f"prompt {i}" for i in range(150)], seed=4)
    assert alone.mean == pytest.approx(bootstrap_mean(values, seed=4))
    seeds = cluster_bootstrap([v for v in values for _ in range(5)], [i for i in range(150) for _ in range(5)], seed=4)
    assert seeds.mean == pytest.approx(alone.mean)  # saying the same five times adds nothing
    one = cluster_bootstrap(values, ["topic"] * 150)
    assert one.mean.value == pytest.approx(np.mean(values))
    assert math.isnan(one.mean.low)


@settings(max_examples=20, deadline=None)  # statsmodels takes its time
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm(ps: list[float]) -> None:
    assert holm(ps) == pytest.approx(multipletests(ps, method="holm")[1])


def test_holm_wants_probabilities() -> None:
    with pytest.raises(InputError, match="a p value of nan"):
        holm([0.1, math.nan])


def exact_power(n: int, discordance: float, difference: float) -> float:
    """Chance that the exact McNemar test rejects at 5 %."""
    total = 0.0
    for flipped in range(n + 1):
        one_way = np.arange(flipped + 1)
        rejects = np.array([mcnemar_p(int(k), flipped - int(k)) <= 0.05 for k in one_way])
        share = (discordance + difference) / (2 * discordance)
        total += stats.binom.pmf(flipped, n, discordance) * float(stats.binom.pmf(one_way, flipped, share) @ rejects)
    return total


@pytest.mark.parametrize(
    ("n", "points"),
    [
        (50, (15, 15, 17)),
        (250, (4, 6, 8)),
        (450, (3, 4, 6)),
        (817, (2, 3, 4)),
        (1319, (1.7, 2.4, 3.4)),
        (14042, (0.5, 0.7, 1.1)),
    ],
)
def test_detectable_difference(n: int, points: tuple[float, float, float]) -> None:
    ours = [100 * detectable_difference(n, discordance) for discordance in (0.05, 0.1, 0.2)]
    assert ours == pytest.approx(points, abs=0.05 if n > 1000 else 0.5)
    if n <= 250:
        for percent, discordance in zip(ours, (0.05, 0.1, 0.2), strict=True):
            assert 0.7 < exact_power(n, max(discordance, percent / 100), percent / 100) < 0.85


def test_too_few_pairs_detect_nothing() -> None:
    assert math.isnan(detectable_difference(3, 1.0))
    assert detectable_difference(4, 1.0) <= 1
    with pytest.raises(InputError, match="discordance 5"):
        detectable_difference(50, 5)


labels = st.lists(st.tuples(st.booleans(), st.sampled_from([True, False, None])), min_size=2, max_size=80)


@given(labels)
def test_confusion(answers: list[tuple[bool, bool | None]]) -> None:
    gold, said = [a for a, _ in answers], [b for _, b in answers]
    ours = confusion(gold, said)
    scored = [(a, b) for a, b in answers if b is not None]
    assert ours.n + ours.unscored == len(answers)
    assert ours.accuracy == rate(sum(a == b for a, b in scored), len(scored))
    assert ours.sensitivity == rate(sum(b for a, b in scored if a), sum(a for a, _ in scored))
    assert ours.specificity == rate(sum(not b for a, b in scored if not a), sum(not a for a, _ in scored))
    if len({label for pair in scored for label in pair}) == 2:
        assert ours.kappa == pytest.approx(cohen_kappa_score(*zip(*scored, strict=True)), abs=1e-12)
    else:
        assert math.isnan(ours.kappa)


def test_kappa_interval() -> None:
    draw = np.random.default_rng(6)
    gold = draw.random(150) < 0.4
    said = gold ^ (draw.random(150) < 0.1)
    theirs = stats.bootstrap(
        (gold, said), cohen_kappa_score, paired=True, vectorized=False, n_resamples=1000, method="percentile", rng=draw
    ).confidence_interval
    ours = kappa_interval(gold.tolist(), [*said.tolist()])
    assert ours.value == pytest.approx(cohen_kappa_score(gold, said))
    assert ours[1:] == pytest.approx((theirs.low, theirs.high), abs=0.02)
    with pytest.raises(InputError, match="150 known labels and 149"):
        kappa_interval(gold.tolist(), said.tolist()[1:])


@pytest.mark.parametrize("truth", [0.0, 0.03, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(
    ("n", "gold", "se", "sp"), [(50, 200, 0.8, 0.95), (400, 100, 0.7, 0.9), (400, 1000, 0.95, 1.0)]
)
def test_corrected_rates_cover_the_truth(
    truth: float, n: int, gold: int, se: float, sp: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demur.eval.judge_error._RESAMPLES", 1000)
    draw = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        interval = rogan_gladen(
            rate(int(draw.binomial(n, truth * se + (1 - truth) * (1 - sp))), n),
            rate(int(draw.binomial(gold, se)), gold),
            rate(int(draw.binomial(gold, sp)), gold),
            seed,
        )
        assert 0 <= interval.low <= interval.value <= interval.high <= 1
        covered += interval.low <= truth <= interval.high
    assert covered >= 0.92 * 400


def test_correcting_a_rate() -> None:
    perfect = rate(10**7, 10**7)
    observed = rate(30, 100)
    assert rogan_gladen(observed, perfect, perfect) == pytest.approx((0.3, observed.low, observed.high), abs=0.01)
    blurred = rogan_gladen(observed, rate(16, 20), rate(18, 20))
    assert blurred.value == pytest.approx((0.3 + 0.9 - 1) / (0.8 + 0.9 - 1))
    assert blurred.high - blurred.low > 2 * (observed.high - observed.low)
    assert rogan_gladen(rate(0, 50), perfect, perfect).low == 0
    hardly = rogan_gladen(observed, rate(11, 20), rate(10, 20))
    assert (hardly.low, hardly.high) == (0, 1)
    assert math.isnan(rogan_gladen(observed, rate(10, 20), rate(10, 20)).value)
    assert math.isnan(rogan_gladen(observed, rate(18, 20), rate(0, 0)).value)
