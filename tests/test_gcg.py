"""GCG: the loss falls, its gradient is right, and the suffix is read as the tokens that were tried."""

import json
from pathlib import Path

import pytest
import torch

from demur.cli.main import main
from demur.data.suites import load_suite
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("gcg") / "model"
    lm = tiny_model()
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


def test_suffixes_are_a_suite_go_on_where_they_stopped_and_are_found_once(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "suffixes.jsonl"
    command = ["suffix", str(file), "--suite", "harmful:3", "--steps", "3", "--width", "16", "--top", "16"]
    command += ["--length", "5", "--model", model, "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["requests"] == 3
    assert told["loss"] <= told["start"]
    whole = file.read_text()
    prompts = load_suite(str(file))
    assert [prompt.wrapper for prompt in prompts] == ["", "gcg"] * 3
    for plain, with_suffix in zip(prompts[::2], prompts[1::2], strict=True):
        assert with_suffix.unwrapped == plain.text
        assert with_suffix.text.startswith(f"{plain.text} ")
        assert (plain.split, plain.intent, with_suffix.category) == ("test", "harmful", plain.category)
    # killed between the two lines of a request, and within one
    lines = whole.splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:30])
    assert main(command) == 0
    assert file.read_text() == whole
    assert main([*command, "--steps", "4"]) == 1
    assert "other settings" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert file.read_text() == whole
