"""Log-likelihoods with everything shared, against one plain forward pass for each request."""

import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demur.errors import InputError
from demur.eval import likelihood
from demur.eval.families import cheapest_batches, families
from demur.eval.likelihood import Request, Score, log_likelihoods
from demur.lm.attach import prompt_lengths
from demur.lm.load import LanguageModel
from demur.spec import Edit, LatentGate, Positions, SteeringSpec
from demur.steering.steer import steer
from demur.testing import ARCHITECTURES, tiny_model, tiny_sae

LM = tiny_model()
SAES = {"s": tiny_sae()}
EDIT = Edit("layers.1.resid_post", "s", (3,), 6.0)
GATE = LatentGate("layers.1.resid_post", "s", 4, 0.3)
SPECS = [
    SteeringSpec(),
    SteeringSpec((EDIT,)),
    SteeringSpec((EDIT,), positions=Positions("generation")),
    SteeringSpec((EDIT,), positions=Positions("last_prompt_token")),
    SteeringSpec((Edit("layers.2.resid_post", "s", (5, 7), 6.0),), gate=GATE),
    SteeringSpec((EDIT,), positions=Positions("user")),
]


def requests(seed: int = 0) -> list[Request]:
    """Like MMLU (a long beginning, choices of one token), like TruthfulQA (answers of many), like PIQA (nothing
    shared), and single ones."""
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(3, 300) for _ in range(n)]

    found = []
    shots, preamble = ids(60), ids(30)
    for _ in range(6):
        question = shots + ids(rng.randrange(1, 20))
        found += [Request(question, [letter]) for letter in (5, 6, 7, 8)]
        question = preamble + ids(rng.randrange(1, 8))
        found += [Request(question, ids(rng.randrange(1, 9))) for _ in range(3)]
        question = ids(rng.randrange(1, 12))
        found += [Request(question, ids(rng.randrange(1, 9))) for _ in range(2)]
    found += [Request([2], ids(40)), found[0], Request(shots, ids(2))]
    rng.shuffle(found)
    return found


def plain(lm: LanguageModel, asked: list[Request], spec: SteeringSpec) -> list[Score]:
    scores = []
    for context, continuation in asked:
        lengths = torch.tensor([len(context)])
        with torch.no_grad(), steer(lm, spec, SAES), prompt_lengths(lm.model, lengths):
            logits = lm.model(torch.tensor([[*context, *continuation]])).logits[0].double()
        log_probs = logits.log_softmax(-1)[len(context) - 1 : -1]
        total = float(log_probs[range(len(continuation)), list(continuation)].sum())
        scores.append(Score(total, log_probs.argmax(-1).tolist() == list(continuation)))
    return scores


def assert_same(found: list[Score], expected: list[Score]) -> None:
    assert [score.log_prob for score in found] == pytest.approx([score.log_prob for score in expected], abs=1e-4)
    assert [score.greedy for score in found] == [score.greedy for score in expected]


def greedy_ones(lm: LanguageModel, asked: list[Request]) -> list[Request]:
    """What the model would write after some of the contexts, so that some answers are greedy."""
    found = []
    for context, _ in asked[:5]:
        with torch.no_grad():
            row = torch.tensor([context])
            for _ in range(3):
                row = torch.cat([row, lm.model(row).logits[:, -1:].argmax(-1)], dim=1)
        found.append(Request(context, row[0, len(context) :].tolist()))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_as_plain_passes_for_every_spec_at_once(architecture: str) -> None:
    lm = tiny_model(architecture)
    asked = requests()
    asked += greedy_ones(lm, asked)
    told: list[float] = []
    found = log_likelihoods(lm, asked, SPECS, SAES, batch_size=4, advance=told.append)
    for spec, scores in zip(SPECS, found, strict=True):
        assert_same(scores, plain(lm, asked, spec))
    assert sum(told) == len(asked) * len(SPECS)
    assert any(score.greedy for score in found[0])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_neither_batches_nor_company_matter(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(1)
    together = log_likelihoods(LM, asked, SPECS[1:5], SAES, batch_size)
    monkeypatch.setattr(likelihood, "_LOGITS", 320 * batch_size * 2)  # two columns of a full batch at once
    for spec, scores in zip(SPECS[1:5], together, strict=True):
        assert_same(log_likelihoods(LM, asked, [spec], SAES, batch_size)[0], scores)


@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
def test_a_sliding_window_looks_as_far_as_without_padding(architecture: str) -> None:
    lm = tiny_model(architecture)
    lm.model.config.sliding_window = 24
    for module in lm.model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 24
    asked = requests(2)
    for spec, scores in zip(SPECS[:2], log_likelihoods(lm, asked, SPECS[:2], SAES, 8), strict=True):
        assert_same(scores, plain(lm, asked, spec))


def test_what_else_is_attached_stays_in_force() -> None:
    asked = requests(3)[:20]
    outer = SteeringSpec((Edit("layers.1.resid_post", "s", (9,), 4.0),))
    with steer(LM, outer, SAES):
        found = log_likelihoods(LM, asked, SPECS[:2], SAES, 4)
    assert_same(found[0], plain(LM, asked, outer))
    with steer(LM, outer, SAES):
        assert_same(found[1], plain(LM, asked, SPECS[1]))


def test_the_model_is_itself_again_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.tensor([[5, 6, 7]])
    before = LM.model(row).logits
    log_likelihoods(LM, requests(), SPECS, SAES, 4)

    def fail(*args: Any) -> Any:
        raise KeyError("on the way")

    monkeypatch.setattr(likelihood, "_rest", fail)
    with pytest.raises(KeyError, match="on the way"):
        log_likelihoods(LM, requests(), SPECS, SAES, 4)
    assert torch.equal(LM.model(row).logits, before)
    assert not any("forward" in module.__dict__ for module in LM.model.modules())


def test_blocks_below_the_lowest_edit_run_once() -> None:
    calls: Counter[int] = Counter()
    handles = [
        block.self_attn.register_forward_hook(lambda *_, number=number: calls.update([number]))
        for number, block in enumerate(LM.model.get_decoder().layers)
    ]
    log_likelihoods(LM, requests(), SPECS, SAES, 4)
    for handle in handles:
        handle.remove()
    assert calls[0] == calls[1]
    assert calls[2] == len(SPECS) * calls[1]


def test_nothing_to_do() -> None:
    assert log_likelihoods(LM, [], SPECS[:2], SAES) == [[], []]
    with pytest.raises(InputError, match="at least one token"):
        log_likelihoods(LM, [Request([], [5])], SPECS)


_CONTEXTS = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 2), min_size=1, max_size=9)).map(
        lambda pair: (*[pair[0]] * 20 * (pair[0] % 2), *pair[1])
    ),
    unique=True,
)


@given(_CONTEXTS, st.integers(1, 5))
def test_families_have_every_context_once_and_begin_alike(contexts: list[tuple[int, ...]], size: int) -> None:
    found = families(contexts, size)
    assert Counter(context for family in found for context in family.contexts) == Counter(contexts)
    for family in found:
        assert 0 < len(family.contexts) <= size
        assert len({context[: family.shared] for context in family.contexts}) == 1
        assert all(len(context) > family.shared for context in family.contexts)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 6), st.integers(0, 30))
def test_batches_have_every_row_once_and_cost_no_more_than_full_ones(
    lengths: list[int], size: int, pass_cost: int
) -> None:
    found = cheapest_batches(lengths, size, pass_cost)
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= size for batch in found)

    def cost(batches: list[list[int]]) -> int:
        return sum(pass_cost + max(lengths[i] for i in batch) * len(batch) for batch in batches)

    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    assert cost(found) <= cost([order[start : start + size] for start in range(0, len(order), size)])
