"""What a `with steer` block does to a model, and what it may not leave behind."""

import pytest
import torch

from demur.errors import InputError, MismatchError
from demur.lm.attach import Step, attach
from demur.lm.batches import pad
from demur.lm.chat import chat_ids
from demur.lm.generate import generate
from demur.lm.load import LanguageModel
from demur.spec import Edit, SteeringSpec
from demur.steering.steer import steer
from demur.testing import ARCHITECTURES, tiny_model, tiny_sae
from demur.types import Hookpoint, Message

SAE = tiny_sae()
SAES = {"s": SAE}


def spec(value: float = 5.0, latent: int = 3, block: int = 1, skip_first: bool = True) -> SteeringSpec:
    return SteeringSpec((Edit(f"layers.{block}.resid_post", "s", (latent,), value),), skip_first=skip_first)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_model(request.param)


def ids_of(lm: LanguageModel, *texts: str) -> list[list[int]]:
    return [chat_ids(lm, [Message("system", "Be safe and kind."), Message("user", text)]) for text in texts]


def test_steering_changes_the_model_and_leaving_restores_it_bit_for_bit(lm: LanguageModel) -> None:
    ids = torch.tensor([ids_of(lm, "Hello")[0]])
    before = lm.model(ids).logits
    with steer(lm.model, spec(20.0), SAES):
        assert not torch.allclose(lm.model(ids).logits, before, atol=1e-3)
    assert torch.equal(lm.model(ids).logits, before)
    with steer(lm.model, SteeringSpec(), {}):
        assert torch.equal(lm.model(ids).logits, before)


def test_what_was_recorded_before_an_edit_keeps_its_numbers(lm: LanguageModel) -> None:
    recorded: list[torch.Tensor] = []

    def look(residual: torch.Tensor, step: Step) -> torch.Tensor:
        recorded.append(residual)  # no copy: an edit in place would change it
        return residual

    ids = torch.tensor([ids_of(lm, "Hello")[0]])
    at = Hookpoint(1)
    with attach(lm.model, at, look):
        lm.model(ids)
        with steer(lm.model, spec(20.0), SAES):
            lm.model(ids)
    assert torch.equal(recorded[0], recorded[1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaving_by_an_error_restores_the_model(lm: LanguageModel, error: type[BaseException]) -> None:
    ids = torch.tensor([ids_of(lm, "Hello")[0]])
    before = lm.model(ids).logits

    def fail(residual: torch.Tensor, step: Step) -> torch.Tensor:
        raise error("midway")

    with (
        pytest.raises(error, match="midway"),
        steer(lm.model, spec(), SAES),
        attach(lm.model, Hookpoint(2), fail),
    ):
        generate(lm, ids.tolist(), 4)
    assert torch.equal(lm.model(ids).logits, before)


def test_cached_generation_equals_uncached(lm: LanguageModel) -> None:
    rows = pad(lm, ids_of(lm, "Hi", "What is blue?"), side="left")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for one in (spec(8.0), spec(8.0, skip_first=False)):
        with steer(lm.model, one, SAES):
            cached = lm.model.generate(input_ids=rows.ids, attention_mask=rows.mask, **settings)
            plain = lm.model.generate(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False, **settings)
        assert torch.equal(cached, plain)


def test_batched_equals_single_under_steering(lm: LanguageModel) -> None:
    rows = ids_of(lm, "Hi", "How do I make a cake?", "Hello there, what is blue and what is not?")
    with steer(lm.model, spec(8.0), SAES):
        assert generate(lm, rows, 6) == [generate(lm, [row], 6)[0] for row in rows]


def test_padding_changes_nothing_and_is_not_steered(lm: LanguageModel) -> None:
    row = ids_of(lm, "Hello")[0]
    seen: list[torch.Tensor] = []

    def look(residual: torch.Tensor, step: Step) -> torch.Tensor:
        seen.append(residual.clone())
        return residual

    for side in ("left", "right"):
        padded = pad(lm, [row, [*row, *row]], side=side)
        seen.clear()
        at = Hookpoint(1)
        with attach(lm.model, at, look), steer(lm.model, spec(8.0), SAES), attach(lm.model, at, look):
            lm.model(padded.ids, attention_mask=padded.mask)
        changed = (seen[0] != seen[1]).any(-1)
        first = torch.zeros_like(changed)
        first[torch.arange(2), padded.mask.long().argmax(1)] = True
        assert torch.equal(changed, padded.mask.bool() & ~first)


def test_only_latents_and_saes_that_exist() -> None:
    lm = tiny_model()
    with (
        pytest.raises(InputError, match="latent 96 does not exist; the SAE has latents 0 to 95"),
        steer(lm.model, spec(latent=96), SAES),
    ):
        pass
    with pytest.raises(MismatchError, match="wants the SAE s, but only none is loaded"), steer(lm.model, spec(), {}):
        pass
    with (
        pytest.raises(MismatchError, match="width 16, but the model's are 32 wide"),
        steer(lm.model, spec(), {"s": tiny_sae(d_in=16)}),
    ):
        pass
    with pytest.raises(InputError, match="outside the model"), steer(lm.model, spec(block=7), SAES):
        pass
    with pytest.raises(InputError, match="latent 3 of SAE s is edited twice"):
        spec() + spec(value=1.0)
