"""The clamp against a slow oracle, and what a `with` block may and may not leave behind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demur.errors import InputError, MismatchError
from demur.lm.attach import Step, attach
from demur.lm.batches import pad
from demur.lm.chat import chat_ids
from demur.lm.generate import generate
from demur.lm.load import LanguageModel
from demur.sae.topk import TopKSae
from demur.steering.clamp import clamp
from demur.steering.steer import steer
from demur.testing import ARCHITECTURES, tiny_model, tiny_sae
from demur.types import Edit, Hookpoint, Message, SteeringSpec

SAE = tiny_sae()
SAES = {"s": SAE}


def spec(value: float = 5.0, latent: int = 3, block: int = 1, skip_first: bool = True) -> SteeringSpec:
    return SteeringSpec((Edit(f"layers.{block}.resid_post", "s", latent, value),), skip_first=skip_first)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_model(request.param)


def ids_of(lm: LanguageModel, *texts: str) -> list[list[int]]:
    return [chat_ids(lm, [Message("system", "Be safe and kind."), Message("user", text)]) for text in texts]


def oracle(x: torch.Tensor, sae: TopKSae, latent: int, value: float) -> torch.Tensor:
    """Encode, set, decode, add the error back: the definition, token by token, in float64."""
    x = x.double()
    w_enc, b_enc, w_dec, b_dec = (t.double() for t in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    out = []
    for token in x.reshape(-1, x.shape[-1]):
        p = (token - b_dec) @ w_enc + b_enc
        z = torch.zeros_like(p)
        top = p.topk(sae.k).indices
        z[top] = p[top].clamp(min=0)
        error = token - (z @ w_dec + b_dec)
        z[latent] = value
        out.append(z @ w_dec + b_dec + error)
    return torch.stack(out).reshape(x.shape)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(0, 30), st.integers(0, 39))
def test_the_clamp_is_encode_set_decode_plus_error(seed: int, k: int, value: float, latent: int) -> None:
    sae = tiny_sae(d_in=16, d_sae=40, k=k, seed=seed % 997)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed)) * 3
    ours = clamp(x, sae, latent, value, torch.ones(2, 5, dtype=torch.bool))
    expected = oracle(x, sae, latent, value)
    assert float((ours.double() - expected).norm() / expected.norm()) < 1e-5


def test_clamping_to_the_value_it_has_changes_nothing() -> None:
    x = torch.randn(1, 6, 32)
    everywhere = torch.ones(1, 6, dtype=torch.bool)
    for latent in range(96):
        for place in range(6):
            value = float(SAE.activation(x, latent)[0, place])
            torch.testing.assert_close(clamp(x, SAE, latent, value, everywhere)[0, place], x[0, place])


def test_the_clamp_is_pure_and_leaves_other_tokens_alone() -> None:
    x = torch.randn(2, 4, 32)
    before = x.clone()
    steered = torch.tensor([[True, False, True, False], [False, False, False, True]])
    out = clamp(x, SAE, 3, 9.0, steered)
    assert torch.equal(x, before)
    assert torch.equal(out[~steered], x[~steered])
    assert bool((out[steered] != x[steered]).any(-1).all())
    half = clamp(x.bfloat16(), SAE, 3, 9.0, steered)
    assert half.dtype == torch.bfloat16


def test_steering_changes_the_model_and_leaving_restores_it_bit_for_bit(lm: LanguageModel) -> None:
    ids = torch.tensor([ids_of(lm, "Hello")[0]])
    before = lm.model(ids).logits
    with steer(lm.model, spec(20.0), SAES):
        assert not torch.allclose(lm.model(ids).logits, before, atol=1e-3)
    assert torch.equal(lm.model(ids).logits, before)
    with steer(lm.model, SteeringSpec(), {}):
        assert torch.equal(lm.model(ids).logits, before)


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
    twice = SteeringSpec((*spec().edits, *spec(latent=4).edits))
    with pytest.raises(InputError, match="two edits at one hookpoint"), steer(lm.model, twice, SAES):
        pass
