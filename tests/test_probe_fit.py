"""Fitting, calibrating and measuring probes, against scikit-learn, simulated truth and counting by hand."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from demur.data.overlap import Held
from demur.errors import InputError
from demur.eval.probe_fit import (
    Kind,
    alarm_rate,
    auroc,
    calibration,
    fit_probe,
    threshold_for,
    weights_of,
)


def simulated(n: int, seed: int = 0, d: int = 6) -> tuple[np.ndarray, list[Kind], list[int]]:
    """Inputs whose log-odds of being harmful are linear in them, one of them in other units than the rest."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(n, d)) * np.array([1, 1, 1, 1, 1, 100.0])[:d] + 3
    logits = 1.5 * (x[:, 0] - 3) - (x[:, 1] - 3)
    harmful = draw.random(n) < 1 / (1 + np.exp(-logits))
    other = draw.random(n) < 0.5
    rest: list[Kind] = ["lookalike" if one else "benign" for one in other]
    kinds: list[Kind] = ["harmful" if h else one for h, one in zip(harmful, rest, strict=True)]
    return x, kinds, list(range(n))


def test_the_folded_weights_find_the_truth_and_are_calibrated() -> None:
    x, kinds, groups = simulated(4_000)
    fit = fit_probe(x, kinds, groups)
    assert fit.weight[0] == pytest.approx(1.5, abs=0.2)
    assert fit.weight[1] == pytest.approx(-1.0, abs=0.2)
    assert abs(fit.weight[5]) < 0.005
    fresh, truth, _ = simulated(4_000, seed=1)
    p = 1 / (1 + np.exp(-(fresh @ fit.weight + fit.bias)))
    for step in calibration(p.tolist(), truth):
        if step.n > 150:
            assert step.harmful == pytest.approx(step.predicted, abs=0.08)
    w = weights_of(truth)
    assert fit.auroc == pytest.approx(roc_auc_score([k == "harmful" for k in truth], p, sample_weight=w), abs=0.02)


def test_out_of_fold_predictions_know_nothing_of_a_prompt_or_its_twin() -> None:
    """Labels are drawn at random for groups of four copies: whoever saw a copy knows, whoever did not cannot."""
    draw = np.random.default_rng(2)
    x = np.repeat(draw.normal(size=(60, 200)), 4, axis=0)
    kinds: list[Kind] = [k for k in ["harmful", "benign"] * 30 for _ in range(4)]
    honest = fit_probe(x, kinds, [i // 4 for i in range(240)])
    assert 0.3 < honest.auroc < 0.7
    leaking = fit_probe(x, kinds, list(range(240)))
    assert leaking.auroc > 0.95


def test_each_kind_has_its_share_of_the_weight() -> None:
    kinds: list[Kind] = ["harmful"] * 3 + ["lookalike"] * 10 + ["benign"] * 100
    w = weights_of(kinds)
    assert w.mean() == pytest.approx(1)
    assert [w[:3].sum(), w[3:13].sum(), w[13:].sum()] == pytest.approx([56.5, 28.25, 28.25])
    w = weights_of(kinds[:13])
    assert [w[:3].sum(), w[3:].sum()] == pytest.approx([6.5, 6.5])


def test_the_threshold_is_the_lowest_that_keeps_every_promise() -> None:
    draw = np.random.default_rng(3)
    p = draw.random(500).round(2).tolist()
    kinds: list[Kind] = (["benign"] * 200) + (["lookalike"] * 100) + (["harmful"] * 200)
    allowed: dict[Kind, float] = {"benign": 0.02, "lookalike": 0.1}
    found = threshold_for(p, kinds, allowed)

    def kept(threshold: float) -> bool:
        return all(
            sum(q > threshold for q, k in zip(p, kinds, strict=True) if k == kind) <= share * kinds.count(kind)
            for kind, share in allowed.items()
        )

    assert found == min(one for one in [0.0, *p] if kept(one))
    with pytest.raises(InputError, match="needs at least 1000 benign prompts to be set on, but there are 200"):
        threshold_for(p, kinds, {"benign": 0.001})
    assert threshold_for(p, kinds, {}) == 0


def test_auroc_equals_scikit_learn_and_its_interval_covers_it() -> None:
    draw = np.random.default_rng(4)
    high, low = draw.normal(1, 1, 80).round(1), draw.normal(0, 1, 60).round(1)
    found = auroc(high.tolist(), low.tolist())
    assert found.value == pytest.approx(roc_auc_score([1] * 80 + [0] * 60, [*high, *low]))
    assert found.low < found.value < found.high
    assert found.high - found.low < 0.2
    assert auroc([], [1.0]).n == 0


def test_rates_are_counted_above_the_threshold() -> None:
    found = alarm_rate([0.1, 0.5, 0.6, 0.9], 0.5)
    assert (found.value, found.n) == (0.5, 4)
    assert (found.low, found.high) == pytest.approx((0.0676, 0.9324), abs=1e-4)
    assert alarm_rate([0.1] * 300, 0.5).high == pytest.approx(0.0122, abs=1e-4)


def test_too_few_prompts_are_refused_in_a_sentence() -> None:
    x, kinds, groups = simulated(40)
    with pytest.raises(InputError, match="1 different harmful prompts were given to train on; give at least 5"):
        fit_probe(x, ["harmful"] + ["benign"] * 39, groups)
    with pytest.raises(InputError, match="3 different harmless prompts"):
        fit_probe(x, kinds, [i if k == "harmful" else 100 + i % 3 for i, k in enumerate(kinds)])


def test_near_copies_are_found_and_other_texts_are_not() -> None:
    held = Held(["How do I kill a Python process that hangs?", "Hi"])
    for text in ("how do i kill a python process that hangs", "How do I kill a Python process that is stuck?", "hi!"):
        assert text in held
    for text in ("How do I kill weeds in my garden?", "Hi there, you", "", "Which Python process hangs?"):
        assert text not in held
