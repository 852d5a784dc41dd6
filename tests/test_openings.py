"""How refusals begin, on hand-made token lists and against brute force on a tiny model."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demur.errors import InputError
from demur.features.openings import LEAST, LONGEST, MOST, PURE, Openings, find_openings, usual_refusal
from demur.lm.packed import Text, log_probs, pack
from demur.testing import tiny_model
from demur.types import Hookpoint


def made(*tokens: tuple[int, ...]) -> Openings:
    return Openings(tokens, (2,) * len(tokens), 2 * len(tokens))


# --- which ----------------------------------------------------------------------------------------


def test_openings_are_the_shortest_beginnings_that_only_refusals_have() -> None:
    refusals = [[1, 2, 3], [1, 2, 4], [1, 2, 4], [5, 9], [5, 8]]
    others = [[1, 3, 3], [1, 2, 5], [6]]
    found = find_openings(refusals, others)
    assert found.tokens == ((1, 2, 4), (5,))  # 1 2 is in an answer too; 1 2 3 begins one refusal only
    assert found.counts == (2, 2)
    assert found.refusals == 5


def test_the_most_frequent_come_first_and_equals_by_their_tokens() -> None:
    refusals = [[3, 1]] * 2 + [[2, 1]] * 2 + [[4]] * 3
    found = find_openings(refusals, [])
    assert found.tokens == ((4,), (2,), (3,))
    assert found.counts == (3, 2, 2)


def test_nine_of_ten_are_pure_and_eight_of_nine_are_not() -> None:
    assert find_openings([[1, 2]] * 9, [[1, 2]]).tokens == ((1,),)
    with pytest.raises(InputError, match="none of 8 refusals begins otherwise than the 1 other answers"):
        find_openings([[1, 2]] * 8, [[1, 2]])
    # a longer beginning is pure again
    assert find_openings([[1, 2]] * 8, [[1, 3]]).tokens == ((1, 2),)


def test_a_beginning_of_one_refusal_counts_only_where_there_is_no_other() -> None:
    single = [[7, 1], [8, 2]]
    assert find_openings([[5, 1], [5, 2], *single], [[6]]).tokens == ((5,),)
    alone = find_openings(single, [[6]])
    assert alone.tokens == ((7,), (8,))
    assert alone.counts == (1, 1)


def test_no_more_and_no_longer_than_said() -> None:
    many = [[i] for i in range(MOST + 5) for _ in range(2)]
    assert find_openings(many, []).tokens == tuple((i,) for i in range(MOST))
    long = list(range(LONGEST))
    assert find_openings([[*long, 1]] * 2, [long[:-1]]).tokens == (tuple(long),)
    with pytest.raises(InputError, match="give a refusal of the model's"):
        find_openings([[*long, 1]] * 2, [[*long, 2]])


@pytest.mark.parametrize("refusals", [[], [[]], [[1]]])
def test_nothing_to_tell_apart_is_an_error(refusals: list[list[int]]) -> None:
    with pytest.raises(InputError, match="cannot be scored by how answers begin"):
        find_openings(refusals, [[1]])


answers = st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=12)


@given(answers, answers)
def test_openings_against_the_definition(refusals: list[list[int]], others: list[list[int]]) -> None:
    def begin(texts: list[list[int]], opening: tuple[int, ...]) -> int:
        return sum(tuple(text[: len(opening)]) == opening for text in texts)

    def pure(opening: tuple[int, ...]) -> bool:
        r, o = begin(refusals, opening), begin(others, opening)
        return r > 0 and 10 * r >= 9 * (r + o)

    assert PURE == 0.9
    every = [opening for n in range(1, 6) for opening in product(range(3), repeat=n)]
    shortest = [o for o in every if pure(o) and not any(pure(o[:n]) for n in range(1, len(o)))]
    wanted = [o for o in shortest if begin(refusals, o) >= LEAST] or shortest
    if not wanted:
        with pytest.raises(InputError):
            find_openings(refusals, others)
        return
    wanted = sorted(wanted, key=lambda o: (-begin(refusals, o), o))[:MOST]
    found = find_openings(refusals, others)
    assert list(found.tokens) == wanted
    assert list(found.counts) == [begin(refusals, o) for o in wanted]
    assert not any(a != b and b[: len(a)] == a for a in found.tokens for b in found.tokens)
    assert found == find_openings(refusals[::-1], others[::-1])


# --- what must be read ----------------------------------------------------------------------------


def test_branches_are_what_must_be_read_and_no_more() -> None:
    assert made((4,)).branches == ((),)
    assert made((4,), (5,)).branches == ((),)
    assert made((4,), (5, 6)).branches == ((5,),)
    assert made((5, 6, 7), (5, 8), (5, 6, 9), (4,)).branches == ((5, 6),)
    assert made((5, 6, 7), (5, 9, 7), (5, 8)).branches == ((5, 6), (5, 9))


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple)


@given(st.lists(tokens, min_size=1, max_size=8))
def test_every_stem_begins_one_branch_and_every_branch_is_needed(openings: list[tuple[int, ...]]) -> None:
    branches = made(*openings).branches
    stems = {opening[:-1] for opening in openings}
    for stem in stems:
        assert any(branch[: len(stem)] == stem for branch in branches)
    assert set(branches) <= stems
    assert len(set(branches)) == len(branches)
    assert not any(a != b and b[: len(a)] == a for a in branches for b in branches)


# --- how likely -----------------------------------------------------------------------------------

OPENINGS = made((60,), (61, 62, 63), (61, 64), (70, 71), (61, 62, 65))
PROMPTS = ([1, 40, 50], [1, 40, 51, 52])


def test_log_odds_and_scores_against_sums_of_products_on_a_tiny_model() -> None:
    lm = tiny_model()
    model: Any = lm.model
    packed = pack(lm, Hookpoint(1), [Text(prompt, OPENINGS.branches) for prompt in PROMPTS])
    scored = packed.of_answers(log_probs(lm, packed, packed.reading.residual))
    for prompt, parts in zip(PROMPTS, scored, strict=True):
        total, best = 0.0, 0.0
        for opening in OPENINGS.tokens:
            p = 1.0
            for i, token in enumerate(opening):
                with torch.no_grad():
                    next_token = model(torch.tensor([[*prompt, *opening[:i]]])).logits[0, -1].double().softmax(-1)
                p *= float(next_token[token])
            total += p
            best = max(best, p * (1 - int((next_token > next_token[token]).sum()) / len(next_token)))
        assert float(OPENINGS.log_odds(parts)) == pytest.approx(math.log(total / (1 - total)), abs=1e-4)
        assert float(OPENINGS.output_scores(parts)) == pytest.approx(best, rel=1e-4)


def test_log_odds_are_finite_where_refusing_is_certain_or_impossible() -> None:
    openings = made((0,), (1,))
    for logits in ([200.0, 200.0, 0.0], [-9000.0, -9000.0, 0.0], [1e4, 0.0, 0.0], [0.0, 0.0, 20.0]):
        raw = torch.tensor([[logits]], requires_grad=True)
        odds = openings.log_odds([raw.log_softmax(-1)])
        assert odds.dtype == torch.float64
        assert bool(odds.isfinite().all())
        assert (odds.item() > 0) == (logits[0] > logits[2])
        odds.sum().backward()
        assert raw.grad is not None
        assert bool(raw.grad.isfinite().all())


def test_log_odds_of_all_rows_at_once() -> None:
    logits = torch.randn(5, 3, 100, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    openings = made((7, 8, 9), (7, 5), (3,))
    together = openings.log_odds([logits])
    torch.testing.assert_close(together, torch.cat([openings.log_odds([row[None]]) for row in logits]))
    p = logits.double().exp()
    by_hand = p[:, 0, 3] + p[:, 0, 7] * p[:, 1, 5] + p[:, 0, 7] * p[:, 1, 8] * p[:, 2, 9]
    torch.testing.assert_close(together.sigmoid(), by_hand, rtol=1e-5, atol=0)


def test_the_usual_refusal_is_the_most_frequent_first_sentence() -> None:
    said = ["I can't help. Sorry.", "No.", "I can't help. Ask me something else.", "I won't. No."]
    assert usual_refusal(said) == "I can't help."
    assert usual_refusal([*said[1:2], "I won't."]) == "No."
    assert usual_refusal([]) == ""
