"""Packed prompts against plain forward passes of each text by itself; the logit lens by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from demur.errors import InputError
from demur.lm.attach import attach
from demur.lm.hookpoints import blocks
from demur.lm.lens import logit_lens
from demur.lm.load import LanguageModel
from demur.lm.packed import Pack, Text, log_probs, pack
from demur.lm.record import read
from demur.testing import ARCHITECTURES, tiny_model
from demur.types import Hookpoint

AT = Hookpoint(1)
LM = tiny_model()
START = [1, 40, 41, 42, 43]
"""What prompts begin with in common."""
CASES = {
    "a shared beginning": [
        Text([*START, 50, 51], ((60, 61, 62), (60, 70), ())),
        Text([*START, 52], ((), (80,))),
        Text([*START, 53, 54, 55, 56], ((60, 61, 62), (60, 61), (90, 91, 92, 93))),
    ],
    "nothing in common": [Text([7, 8, 9], ((10, 11), (12,))), Text([20], ((21, 22),)), Text([30, 31], ())],
    "no answers": [Text([*START, 50], ()), Text([*START, 51, 52], ())],
    "one text": [Text([*START, 50], ((60, 61), (62,)))],
    "one text of one token": [Text([5], ())],
    "the same prompt twice": [Text([*START, 50], ((60,),)), Text([*START, 50], ((61, 62),))],
    "a prompt that begins another": [Text(START, ((60, 61),)), Text([*START, 50, 51], ((60, 61),))],
}


def alone(lm: LanguageModel, prompt: Any, answer: Any) -> Tensor:
    """[length + 1, vocab] what predicts each token of `answer` and what follows it, by an ordinary forward pass."""
    model: Any = lm.model
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 :]
    return torch.log_softmax(logits.float(), -1)


def compare(packed: Pack, scored: Tensor, lm: LanguageModel, row: int = 0) -> None:
    found = packed.of_answers(scored)
    assert len(found) == len(packed.texts)
    for parts, text in zip(found, packed.texts, strict=True):
        answers = text.answers or ((),)
        assert len(parts) == len(answers)
        for part, answer in zip(parts, answers, strict=True):
            with torch.no_grad():
                wanted = alone(lm, text.prompt, answer)
            torch.testing.assert_close(part[row], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_texts_are_what_they_are_alone(architecture: str, case: str) -> None:
    lm = tiny_model(architecture)
    for place in (AT, Hookpoint(2)):
        packed = pack(lm, place, CASES[case])
        scored = log_probs(lm, packed, packed.reading.residual)
        assert not scored.requires_grad
        compare(packed, scored, lm)


def test_eager_attention_gives_the_same() -> None:
    lm = tiny_model()
    lm.model.set_attn_implementation("eager")
    packed = pack(lm, AT, CASES["a shared beginning"])
    compare(packed, log_probs(lm, packed, packed.reading.residual), LM)


def test_nothing_is_run_twice() -> None:
    packed = pack(LM, AT, CASES["a shared beginning"])
    rest, answers = 2 + 1 + 4, 5 + 1 + 9
    assert packed.ids.shape == packed.positions.shape == (1, len(START) + rest + answers)
    assert len(packed.columns) == 3 + answers
    assert packed.of_answers(torch.arange(18.0)[:, None])[1][1].flatten().tolist() == [6, 7]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_rows_of_residuals_are_what_edits_at_the_hookpoint_do(architecture: str) -> None:
    lm = tiny_model(architecture)
    packed = pack(lm, AT, CASES["a shared beginning"])
    move = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(1))
    factor = torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    scored = log_probs(lm, packed, packed.reading.residual * factor + move)
    assert scored.shape == (3, len(packed.columns), lm.model.config.vocab_size)
    for row in range(3):
        with attach(lm.model, AT, lambda x, step, row=row: x * factor[row] + move[row]):
            compare(packed, scored, lm, row)


def test_gradients_are_those_of_plain_passes() -> None:
    texts = CASES["a shared beginning"]
    packed = pack(LM, AT, texts)
    move = torch.randn(32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    ours = log_probs(LM, packed, packed.reading.residual + move)
    total = torch.stack([part[0, :, 60].sum() for parts in packed.of_answers(ours) for part in parts]).sum()
    (found,) = torch.autograd.grad(total, move)
    with attach(LM.model, AT, lambda x, step: x + move):
        parts = [alone(LM, text.prompt, answer) for text in texts for answer in text.answers]
    (wanted,) = torch.autograd.grad(torch.stack([part[:, 60].sum() for part in parts]).sum(), move)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert float(wanted.norm()) > 1e-2


def test_the_model_is_itself_again_afterwards() -> None:
    ids = torch.tensor([START])
    model: Any = LM.model
    with torch.no_grad():
        before = model(ids).logits
        packed = pack(LM, AT, CASES["one text"])
        log_probs(LM, packed, packed.reading.residual)
        with pytest.raises(RuntimeError):
            log_probs(LM, packed, packed.reading.residual[..., :5])
        assert torch.equal(model(ids).logits, before)
    assert not any("forward" in block.__dict__ or block._forward_hooks for block in blocks(LM.model))


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3_text"])
def test_a_text_may_fill_the_sliding_window_but_not_exceed_it(architecture: str) -> None:
    lm = tiny_model(architecture)
    lm.model.config.sliding_window = 9
    texts = [Text([*START, 50, 51], ((60, 61), (62,))), Text([*START, 52], ((63, 64, 65),))]
    packed = pack(lm, AT, texts)
    assert packed.ids.shape[1] > 9
    compare(packed, log_probs(lm, packed, packed.reading.residual), lm)
    longer = [texts[0], Text([*START, 52], ((63, 64, 65, 66),))]
    with pytest.raises(InputError, match=r"has 10 tokens, but .* looks back 9 at most"):
        pack(lm, AT, longer)
    # the error is no false alarm: the plain pass of the long text does forget
    with torch.no_grad():
        forgets = alone(lm, longer[1].prompt, longer[1].answers[0])
        lm.model.config.sliding_window = 4096
        assert float((forgets - alone(lm, longer[1].prompt, longer[1].answers[0])).abs().max()) > 1e-3


def test_attention_that_takes_no_mask_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_model()
    monkeypatch.setattr(lm.model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(InputError, match="runs with flash_attention_2 attention, which takes no mask"):
        pack(lm, AT, CASES["one text"])


# --- the logit lens -------------------------------------------------------------------------------


def by_hand(lm: LanguageModel, x: Tensor) -> Tensor:
    model: Any = lm.model
    kind = lm.model.config.model_type
    if kind == "gpt_neox":
        x = model.gpt_neox.final_layer_norm(x)
    else:
        x = model.transformer.ln_f(x) if kind == "gpt2" else model.model.norm(x)
    logits: Tensor = x @ model.get_output_embeddings().weight.T
    return logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_lens_is_the_final_norm_and_the_output_matrix(architecture: str) -> None:
    lm = tiny_model(architecture)
    vectors = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    found = logit_lens(lm, vectors)
    assert not found.requires_grad
    torch.testing.assert_close(found, by_hand(lm, vectors).detach())
    torch.testing.assert_close(logit_lens(lm, vectors.double()), found)
    # behind the last block nothing is left out, so the lens says what the model says
    ids = torch.tensor([START])
    model: Any = lm.model
    said = logit_lens(lm, read(lm.model, Hookpoint(2), ids).residual[0])
    if cap := getattr(lm.model.config, "final_logit_softcapping", None):
        said = cap * torch.tanh(said / cap)
    with torch.no_grad():
        torch.testing.assert_close(said, model(ids).logits[0], atol=1e-4, rtol=1e-4)


def test_a_model_without_a_final_norm_has_no_lens() -> None:
    lm = tiny_model()
    del lm.model.get_decoder().norm
    with pytest.raises(InputError, match="no final norm was found in LlamaForCausalLM"):
        logit_lens(lm, torch.zeros(1, 32))
