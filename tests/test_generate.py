"""`demur generate` and `demur chat`: what is streamed, what steers, what is read, and what a user does wrong."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny_study import save_model

import demur.verbs.chat as chat_verb
import demur.verbs.generate as verb
from demur.cli.main import main
from demur.lm.attach import Step, attach
from demur.lm.chat import chat_ids
from demur.lm.generate import generate
from demur.lm.load import LanguageModel, load
from demur.sae.store import LoadedSae, SaeConfig, SaeModel, load_sae, save_sae
from demur.spec import Edit, SteeringSpec
from demur.steering.spec_file import write_spec
from demur.steering.steer import steer
from demur.testing import tiny_model, tiny_sae
from demur.types import Hookpoint, Message

LATENTS = (69, 35)
"""Active now and then in the answers of the model that is used here."""
TOKENS = 12


class Tiny(NamedTuple):
    """A model, an SAE and a spec, as files and as they are loaded from them."""

    lm: LanguageModel
    sae: LoadedSae
    spec: SteeringSpec
    options: list[str]

    def says(self, *turns: Message, spec: SteeringSpec | None = None, system: str = "") -> str:
        """The oracle: demur's own batch generation, greedy and not streamed."""
        messages = [*([Message("system", system)] if system else []), *turns]
        with steer(self.lm, spec or SteeringSpec(), [self.sae]):
            return generate(self.lm, [chat_ids(self.lm, messages)], TOKENS)[0].text


def user(text: str) -> Message:
    return Message("user", text)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    made = tiny_model(seed=2)
    save_model(made, folder / "model")
    made_for = SaeModel(made.name, made.fingerprint, made.n_blocks)
    save_sae(folder / "sae", tiny_sae(), SaeConfig(32, 96, 8, "layers.1.resid_post", made_for))
    sae = load_sae(folder / "sae")
    spec = SteeringSpec((Edit("layers.1.resid_post", sae.hash, LATENTS, 1.0),))
    write_spec(folder / "spec.json", spec)
    options = ["--model", str(folder / "model"), "--sae", str(folder / "sae"), "--spec", str(folder / "spec.json")]
    return Tiny(load(str(folder / "model")), sae, spec, [*options, "--max-new-tokens", str(TOKENS)])


Out = pytest.CaptureFixture[str]
Type = Callable[[str], None]


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Type:
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def without_spec(options: list[str]) -> list[str]:
    at = options.index("--spec")
    return options[:at] + options[at + 2 :]


def test_streamed_text_is_the_text_and_the_oracles(tiny: Tiny, capsys: Out) -> None:
    assert main(["generate", "Hello", *tiny.options]) == 0
    streamed = capsys.readouterr()
    assert main(["generate", "Hello", *tiny.options, "--json"]) == 0
    quiet = capsys.readouterr()
    found = json.loads(quiet.out)
    text = found["answers"][0]["text"]
    assert streamed.out == text + "\n"
    assert quiet.err.startswith(text)
    assert text == tiny.says(user("Hello"), spec=tiny.spec) != tiny.says(user("Hello"))
    assert "tokens steered" in streamed.err


def test_json_is_one_object_that_proves_the_spec(tiny: Tiny, capsys: Out) -> None:
    assert main(["generate", "Hello", "Why?", *tiny.options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"model", "spec", "answers"}
    assert found["model"] == tiny.options[1]
    assert found["spec"] == tiny.spec.hash
    assert [answer["prompt"] for answer in found["answers"]] == ["Hello", "Why?"]
    for answer in found["answers"]:
        assert set(answer) == {"prompt", "spec", "text", "tokens", "stop", "applied"}
        assert answer["spec"] == tiny.spec.hash
        prompt = len(chat_ids(tiny.lm, [user(answer["prompt"])]))
        assert [one["name"] for one in answer["applied"]] == [f"latent {i} of {tiny.sae.hash}" for i in sorted(LATENTS)]
        for one in answer["applied"]:
            # the first token is left alone, and the last is written but not read
            assert one["steered"] == prompt + TOKENS - 2
            assert 0 < one["changed"] <= one["steered"]
            assert one["mean_norm"] > 0


def test_compare_answers_unsteered_first_and_labels_both(tiny: Tiny, capsys: Out) -> None:
    assert main(["generate", "Hello", "--compare", *tiny.options, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    plain, steered = found["answers"]
    assert (plain["spec"], steered["spec"], found["spec"]) == ("unsteered", tiny.spec.hash, tiny.spec.hash)
    assert plain["text"] == tiny.says(user("Hello"))
    assert steered["text"] == tiny.says(user("Hello"), spec=tiny.spec)
    assert plain["applied"] == []
    assert said.err.startswith(f"[unsteered]\n{plain['text']}\n[{tiny.spec.hash}]\n{steered['text']}\n")


def test_the_unsteered_answer_has_the_callers_system_prompt_but_not_the_specs(
    tiny: Tiny, tmp_path: Path, capsys: Out
) -> None:
    write_spec(tmp_path / "system.json", SteeringSpec(system="Be kind."))
    options = [*tiny.options, "--spec", str(tmp_path / "system.json"), "--compare", "--json"]
    assert main(["generate", "Hello", *options, "--system", "No."]) == 1
    assert "a system prompt of its own and --system gives another" in json.loads(capsys.readouterr().out)["error"]
    for more, plain, steered in (([], "", "Be kind."), (["--system", "Be kind."], "Be kind.", "Be kind.")):
        assert main(["generate", "Hello", *options, *more]) == 0
        texts = [answer["text"] for answer in json.loads(capsys.readouterr().out)["answers"]]
        assert texts == [tiny.says(user("Hello"), system=plain), tiny.says(user("Hello"), system=steered)]


def test_the_prompt_may_come_from_stdin(tiny: Tiny, stdin: Type, capsys: Out) -> None:
    want = tiny.says(user("Hello\nthere"), spec=tiny.spec) + "\n"
    for arguments in ([], ["-"]):
        stdin("Hello\nthere\n")
        assert main(["generate", *arguments, *tiny.options]) == 0
        assert capsys.readouterr().out == want


def test_a_latent_in_place_of_a_spec_and_nothing_at_all(tiny: Tiny, capsys: Out) -> None:
    bare = without_spec(tiny.options)
    assert main(["generate", "Hello", *bare, "--latent", "3", "--value", "30"]) == 0
    spec = SteeringSpec((Edit("layers.1.resid_post", tiny.sae.hash, (3,), 30.0),))
    assert capsys.readouterr().out == tiny.says(user("Hello"), spec=spec) + "\n"
    assert main(["generate", "Hello", *bare]) == 0
    assert capsys.readouterr().out == tiny.says(user("Hello")) + "\n"


def test_sampling_follows_the_seed_and_nothing_else(tiny: Tiny, capsys: Out) -> None:
    def texts(*more: str) -> list[str]:
        assert main(["generate", *more, *tiny.options, "--temperature", "1.5", "--json"]) == 0
        return [answer["text"] for answer in json.loads(capsys.readouterr().out)["answers"]]

    before = torch.get_rng_state()
    one = texts("Why?", "--seed", "1")
    assert torch.equal(torch.get_rng_state(), before)
    assert texts("Hello", "Why?", "--seed", "1")[1:] == one
    assert texts("Why?", "--seed", "2") != one
    assert texts("Why?", "--top-p", "1e-9") == [tiny.says(user("Why?"), spec=tiny.spec)]


def test_an_interrupt_exits_with_130_and_leaves_the_model_restored(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    loaded = verb.Loaded(tiny.lm, tiny.spec, [tiny.sae], [], "")
    monkeypatch.setattr(verb, "load_steered", lambda config, need_spec: loaded)
    interrupt_at(monkeypatch, 4)
    before = tiny.says(user("Hello"))
    assert main(["generate", "Hello", *tiny.options]) == 130
    said = capsys.readouterr()
    assert tiny.says(user("Hello"), spec=tiny.spec).startswith(said.out.strip())
    assert said.out.endswith("\n")
    assert "Traceback" not in said.err
    assert tiny.says(user("Hello")) == before
    assert "generate" not in vars(tiny.lm.model)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    """Ctrl-C after so many tokens, once."""
    put, left = verb.Stream.put, token

    def interrupted(self: verb.Stream, value: torch.Tensor) -> None:
        nonlocal left
        put(self, value)
        left -= value.ndim == 1
        if left == 0 and value.ndim == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(verb.Stream, "put", interrupted)


def test_pieces_are_written_once_they_are_certain(tiny: Tiny) -> None:
    text = "  a 字 and é.\n\n b 🙂\n"
    pieces: list[str] = []
    stream = verb.Stream(tiny.lm, pieces.append)
    ids = tiny.lm.tokenizer(text, add_special_tokens=False).input_ids
    stream.put(torch.tensor([[1, 2, 3]]))  # a prompt
    for token in [*ids, 2]:  # the last ends the turn
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == stream.text == text.strip()
    assert stream.ids == ids
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_answer_ends_where_the_context_does(tiny: Tiny, capsys: Out) -> None:
    long = "a " * 494
    length = len(chat_ids(tiny.lm, [user(long)]))
    options = without_spec(tiny.options)
    assert 512 - TOKENS < length < 512
    assert main(["generate", long, *options, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["answers"][0]
    assert (answer["tokens"], answer["stop"]) == (512 - length, "length")


def test_chat_keeps_the_conversation_until_stdin_ends(tiny: Tiny, stdin: Type, capsys: Out) -> None:
    first = tiny.says(user("Hello"), spec=tiny.spec)
    turns = [user("Hello"), Message("assistant", first), user("Why?")]
    stdin("Hello\n\nWhy?\n/reset\nWhy?")
    assert main(["chat", *tiny.options]) == 0
    second, third = tiny.says(*turns, spec=tiny.spec), tiny.says(user("Why?"), spec=tiny.spec)
    said = capsys.readouterr()
    assert said.out == f"{first}\n{second}\n{third}\n"
    assert second != third
    assert "the conversation is forgotten" in said.err


def test_off_gives_the_unsteered_answer_and_on_the_steered_one(tiny: Tiny, stdin: Type, capsys: Out) -> None:
    stdin("/off\nHello\n/reset\n/on\nHello\n/quit\nnever read\n")
    assert main(["chat", *tiny.options]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tiny.says(user('Hello'))}\n{tiny.says(user('Hello'), spec=tiny.spec)}\n"
    assert "steering is off\n" in said.err
    assert f"steering is on, spec {tiny.spec.hash}\n" in said.err
    stdin("/on\n")
    assert main(["chat", *without_spec(tiny.options)]) == 0
    assert "no spec was given" in capsys.readouterr().err


def test_help_and_unknown_commands(tiny: Tiny, stdin: Type, capsys: Out) -> None:
    stdin("/help\n/nothing at all\n")
    assert main(["chat", *tiny.options]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith("/nothing is no command; /help lists them\n")
    for command in ("/on", "/off", "/latents", "/reset", "/help", "/quit"):
        assert f"{command} " in said.err


@pytest.mark.parametrize("on", [True, False])
def test_latents_are_the_models_own_on_each_token_of_the_answer(tiny: Tiny, stdin: Type, capsys: Out, on: bool) -> None:
    stdin(f"/latents\n{'/on' if on else '/off'}\nHello\n/latents\nWhy?\n")
    assert main(["chat", *tiny.options]) == 0
    shown = capsys.readouterr().out
    prompt = chat_ids(tiny.lm, [user("Hello")])
    # the oracle: the whole conversation in one pass under the same steering, encoded as a whole
    seen: list[torch.Tensor] = []

    def look(residual: torch.Tensor, step: Step) -> torch.Tensor:
        seen.append(residual[0].clone())
        return residual

    spec = tiny.spec if on else SteeringSpec()
    with steer(tiny.lm, spec, [tiny.sae]):
        answer = generate(tiny.lm, [prompt], TOKENS)[0]
    with attach(tiny.lm.model, Hookpoint(1), look), steer(tiny.lm, spec, [tiny.sae]), torch.no_grad():
        tiny.lm.model(torch.tensor([prompt + answer.ids]))
    acts = tiny.sae.sae.encode(seen[0])[len(prompt) :][:, list(LATENTS)]
    want = ["\t".join(["token", *(f"latent {latent} at layers.1.resid_post" for latent in LATENTS)])]
    for token, row in zip(answer.ids, acts.tolist(), strict=True):
        want.append("\t".join([repr(tiny.lm.tokenizer.decode(token)), *(f"{act:.3f}" for act in row)]))
    # the model has not read the token that it wrote last
    want[-1] = "\t".join([want[-1].split("\t")[0], "-", "-"])
    assert shown.startswith("\n".join([answer.text, *want, ""]))
    assert shown.count("token\t") == 1
    assert bool((acts > 0).any())


def test_a_terminal_gets_shaded_text(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    rows = [chat_verb.TokenRow("[b]I\n", [0.0]), chat_verb.TokenRow(" can", [2.5]), chat_verb.TokenRow("'t", [None])]
    chat_verb.show_tokens(["latent 3"], rows)
    shown = capsys.readouterr().out
    assert "\x1b[" in shown
    plain = "".join(part.partition("m")[2] if place else part for place, part in enumerate(shown.split("\x1b[")))
    assert plain == "latent 3, at most 2.5: [b]I\\n can(2.5)'t\n"


def test_ctrl_c_stops_one_answer_and_keeps_what_was_said(
    tiny: Tiny, stdin: Type, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = verb.Stream(tiny.lm, lambda piece: None)
    for token in generate(tiny.lm, [chat_ids(tiny.lm, [user("Hello")])], 5)[0].ids:
        stream.put(torch.tensor([token]))
    interrupt_at(monkeypatch, 5)
    stdin("Hello\nWhy?\n")
    assert main(["chat", *without_spec(tiny.options)]) == 0
    said = capsys.readouterr()
    second = tiny.says(user("Hello"), Message("assistant", stream.text), user("Why?"))
    assert said.out == f"{stream.text}\n{second}\n"
    assert stream.text
    assert "stopped; what was said so far is kept" in said.err


def test_ctrl_c_at_the_prompt_ends_the_chat(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(prompt: str = "") -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert main(["chat", *tiny.options]) == 0


def test_a_conversation_that_is_too_long_says_so_and_goes_on(tiny: Tiny, stdin: Type, capsys: Out) -> None:
    stdin("a " * 600 + "\nHello\n")
    assert main(["chat", *tiny.options]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == tiny.says(user("Hello"), spec=tiny.spec)
    assert "reads at most 512 with its answer" in said.err


def test_mistakes_are_one_sentence(tiny: Tiny, tmp_path: Path, stdin: Type, capsys: Out) -> None:
    bare = without_spec(tiny.options)

    def said(*arguments: str) -> str:
        stdin("\n")
        assert main(list(arguments)) == 1
        found = capsys.readouterr()
        assert found.out == ""
        lines = found.err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("demur: ")
        return lines[0]

    assert "stdin is empty" in said("generate", *tiny.options)
    assert "stdin is empty" in said("generate", "Hello", "-", *tiny.options)
    assert "prompt 2 is empty" in said("generate", "Hello", " ", *tiny.options)
    assert "prompt 1 is not UTF-8" in said("generate", "a\udcff", *tiny.options)
    assert "no spec was given" in said("generate", "Hello", "--compare", *bare)
    assert "both a spec and a latent" in said("generate", "Hello", "--latent", "3", *tiny.options)
    assert "max_new_tokens is 0" in said("generate", "Hello", *bare, "--max-new-tokens", "0")
    assert "temperature is -1" in said("generate", "Hello", *bare, "--temperature", "-1")
    for mode in (["generate", "Hello"], ["chat"]):
        assert "no.json" in said(*mode, *bare, "--spec", str(tmp_path / "no.json"))
        assert "latent 96 does not exist" in said(*mode, *bare, "--latent", "96")
        write_spec(tmp_path / "other.json", SteeringSpec((Edit("layers.1", "feedfeedfeedfeed", (3,), 1.0),)))
        assert "wants the SAE feedfeedfeedfeed" in said(*mode, *bare, "--spec", str(tmp_path / "other.json"))
    assert "latents are to be shown, but no spec" in said("chat", "--latents", *bare)
    monkey = io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8")
    for mode in ("generate", "chat"):
        monkey.seek(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", monkey)
            assert main([mode, *tiny.options]) == 1
        assert capsys.readouterr().err == "demur: stdin is not UTF-8 text; convert it to UTF-8 first\n"


def test_errors_are_json_too(tiny: Tiny, stdin: Type, capsys: Out) -> None:
    stdin("")
    assert main(["generate", "--json", *tiny.options]) == 1
    assert json.loads(capsys.readouterr().out)["kind"] == "InputError"
