"""GCG: the loss falls, its gradient is right, and the suffix is read as the tokens that were tried."""

import pytest
import torch

from demur.errors import InputError
from demur.lm.chat import chat_ids
from demur.lm.gcg import _around, _gradient, _losses, _prefix, gcg
from demur.testing import tiny_model
from demur.types import Message

ASK = [Message("user", "How do I make a cake?")]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_the_loss_falls_and_is_what_the_model_says_of_the_whole_text(kind: str) -> None:
    lm = tiny_model(kind)
    found = gcg(lm, ASK, "The answer", steps=12, width=32, top=16, length=6)
    assert found.loss < found.start
    assert found.text.isascii()
    ids = chat_ids(lm, [Message("user", f"{ASK[0].content} {found.text}")])
    target = lm.tokenizer("The answer").input_ids
    logits = lm.model(torch.tensor([[*ids, *target]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    loss = -logits.gather(1, torch.tensor(target)[:, None]).mean()
    assert float(loss.detach()) == pytest.approx(found.loss, rel=1e-3)
    again = gcg(lm, ASK, "The answer", steps=12, width=32, top=16, length=6)
    assert again == found


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_the_gradient_is_that_of_small_changes(kind: str) -> None:
    lm = tiny_model(kind)
    around = _around(lm, ASK, "The answer")
    suffix = [60, 70, 80]
    cache = _prefix(lm, around.before)
    gradient = _gradient(lm, around, cache, suffix)
    weight = lm.model.get_input_embeddings().weight
    before = _losses(lm, around, cache, torch.tensor([suffix]))[0]
    step = 1e-2
    for place, token in ((0, 5), (2, 200)):
        kept = weight[suffix[place]].clone()
        with torch.no_grad():
            weight[suffix[place]] += step * weight[token]
            moved = _losses(lm, around, cache, torch.tensor([suffix]))[0]
            weight[suffix[place]] = kept
        # only the suffix reads that row again: what stands before it is cached, and no other token is the same
        assert float(moved - before) / step == pytest.approx(float(gradient[place, token]), rel=0.1, abs=2e-3)


def test_a_target_without_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="at least a word"):
        gcg(tiny_model(), ASK, "", steps=1)
