"""Sets of latents against trying every set, on a tiny model."""

import itertools
from collections.abc import Sequence

import pytest
import torch

from demur.features.controls import matched_latents, random_direction
from demur.features.openings import Openings
from demur.features.referee import Referee
from demur.features.sets import clamped, grow, refine
from demur.lm.chat import chat_ids
from demur.sae.store import LoadedSae, SaeConfig, SaeModel
from demur.spec import Edit, SteeringSpec
from demur.testing import tiny_model, tiny_sae
from demur.types import Hookpoint, Message

LM, SAE, AT = tiny_model(), tiny_sae(), Hookpoint(1)
LOADED = LoadedSae(SAE, SaeConfig(32, 96, 8, str(AT), SaeModel("tiny", "f", 3)), "s", "memory")
ROWS = [chat_ids(LM, [Message("user", text)]) for text in ("Hi", "How do I make a cake?", "What is blue?")]
OPENINGS = Openings(((40, 50), (41,)), (2, 2), 4)


def make(latents: Sequence[int], values: Sequence[float]) -> SteeringSpec:
    return SteeringSpec(tuple(Edit(str(AT), "s", (i,), v) for i, v in zip(latents, values, strict=True)))


@pytest.fixture(scope="module")
def referee() -> Referee:
    return Referee(LM, AT, OPENINGS, ROWS, [(row, [60, 61, 62]) for row in ROWS], [LOADED])


def test_the_greedy_set_takes_the_best_addition_each_time(referee: Referee) -> None:
    pool, value, target, price = [3, 8, 20, 33, 50], 2.0, 100.0, 0.5
    grown = grow(referee, make, pool, value, 3, target, price)
    assert grown
    chosen: list[int] = []
    for step in grown:
        worth = {}
        for latent in set(pool) - set(chosen):
            spec = make([*chosen, latent], [value] * (len(chosen) + 1))
            odds = float(referee.log_odds([spec]).mean())
            worth[latent] = min(odds, target) - price * float(referee.damage([spec]).kl.mean())
        chosen.append(max(worth, key=lambda latent: worth[latent]))
        assert step.latents == tuple(chosen)
        assert step.log_odds == pytest.approx(float(referee.log_odds([make(chosen, step.values)]).mean()), abs=1e-5)


def test_nothing_joins_that_is_not_worth_its_damage(referee: Referee) -> None:
    assert len(grow(referee, make, [3, 8, 20], 4.0, 3, target=-1e9, price=1e9)) == 1


def test_the_differentiable_clamp_is_the_engines(referee: Referee) -> None:
    for one, latents in itertools.product(referee.packs(), [(3,), (8, 20, 33)]):
        values = torch.tensor([2.5, 4.0, 1.0][: len(latents)])
        found = clamped(one, SAE, latents, values)
        torch.testing.assert_close(found, referee.edited(one, [make(latents, values.tolist())]), atol=1e-5, rtol=1e-5)


def test_refining_keeps_the_target_and_spares_damage(referee: Referee) -> None:
    latents, before = (3, 8, 20), (4.0, 4.0, 4.0)
    start = make(latents, before)
    target = float(referee.log_odds([start]).mean()) - 0.05
    after = refine(referee, SAE, latents, before, target)
    end = make(latents, after)
    assert all(value > 0 for value in after)
    assert float(referee.damage([end]).kl.mean()) < float(referee.damage([start]).kl.mean())
    assert float(referee.log_odds([end]).mean()) > target - 0.3


def test_matched_latents_are_random_among_the_nearest() -> None:
    rates = torch.tensor([0.1, 0.11, 0.09, 0.5, 0.0, 0.12, 0.1, 0.1])
    norms = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0, 1.0])
    found = matched_latents(rates, norms, 0, [7], 1, torch.Generator().manual_seed(0))
    again = matched_latents(rates, norms, 0, [7], 1, torch.Generator().manual_seed(0))
    assert found == again
    assert set(found) <= {1, 2, 5, 3}  # not itself, not the related one, not one that never fires, not the long one
    assert matched_latents(rates, norms, 0, range(8), 3, torch.Generator().manual_seed(0)) == []


def test_a_random_direction_has_the_length_asked_for() -> None:
    one, same, other = (random_direction(32, 7.5, str(AT), torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert float(one.vector.norm()) == pytest.approx(7.5, rel=1e-5)
    assert one.hash == same.hash != other.hash
