"""The command line: fast help, one JSON object, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_study import save_model

from demur.cli.main import main
from demur.sae.store import load_sae
from demur.testing import tiny_model


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "demur.cli.main", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("arguments", [["--help"], ["study", "--help"], ["sae", "train", "--help"], ["--version"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom demur.cli.main import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'plotly', 'pydantic'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_no_arguments_show_the_help() -> None:
    done = run()
    assert "study" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_option_is_a_usage_error() -> None:
    done = run("study", "--no-such-option")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m demur.cli.main study --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i} and why is it blue?"},
                      {"role": "assistant", "content": f"I'm sorry, but {i * 7} cakes can't help with that."}]}
        for i in range(60)
    ]  # fmt: skip
    rows += [{"text": f"Plain text number {i}. " * 3} for i in range(20)]  # type: ignore[misc]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_model(tiny_model(), folder / "model")
    return folder


def train(chat: Path, out: Path, *more: str) -> list[str]:
    small = ["--hookpoint", "layers.1", "--d-sae", "64", "--k", "4", "--batch-size", "64", "--epochs", "2"]
    return [
        "sae", "train", "--data", str(chat / "chat.jsonl"), "--model", str(chat / "model"), "--out", str(out),
        "--heldout", "0.1", *small, *more,
    ]  # fmt: skip


def test_train_then_eval_an_sae(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*train(chat, tmp_path / "sae"), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert {"fvu", "l0", "dead", "ce_recovered", "hash"} <= set(trained)
    assert 0 < trained["fvu"] < 1
    assert trained["l0"] <= 4
    card = (tmp_path / "sae/README.md").read_text()
    assert "| chat | 80 |" in card
    evaluate = ["sae", "eval", str(tmp_path / "sae"), "--data", str(chat / "chat.jsonl"), "--json"]
    assert main(evaluate) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hash"] == trained["hash"]
    assert {"fvu", "l0", "dead", "ce_recovered"} <= set(found)
    assert found["fvu"] == pytest.approx(trained["fvu"], abs=0.1)
    before = load_sae(tmp_path / "sae")
    assert before.sae.reference is not None
    weights = {name: value.clone() for name, value in before.sae.state_dict().items()}
    assert main(["sae", "measure", str(tmp_path / "sae"), "--data", str(chat / "chat.jsonl"), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    after = load_sae(tmp_path / "sae")
    assert (measured["hash_before"], measured["hash"]) == (before.hash, after.hash)
    assert after.sae.reference is not None
    assert all(torch.equal(value, weights[name]) for name, value in after.sae.state_dict().items())
    # the same text, but whole documents of it and without the share that was held out for measuring
    torch.testing.assert_close(after.sae.reference.max_act, before.sae.reference.max_act, atol=0.1, rtol=0.3)


def test_training_interrupted_anywhere_ends_with_the_same_weights(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import demur.record
    import demur.verbs.sae_train as verb

    monkeypatch.setattr(verb, "_CHECKPOINT_STEPS", 10)
    assert main(train(chat, tmp_path / "whole")) == 0
    whole = (tmp_path / "whole/sae.safetensors").read_bytes()
    real = demur.record.os.fsync

    class Killed(BaseException):
        pass

    for after in (1, 3, 5, 7, 9):
        left = after

        def fsync(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            real(descriptor)

        out = tmp_path / f"killed-{after}"
        with monkeypatch.context() as patch:
            patch.setattr(demur.record.os, "fsync", fsync)
            with pytest.raises(Killed):
                main(train(chat, out))
        assert main(train(chat, out)) == 0
        assert (out / "sae.safetensors").read_bytes() == whole


def test_bad_training_input(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(arguments: list[str]) -> str:
        assert main(arguments) == 1
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "outside the model" in said(train(chat, tmp_path / "a", "--hookpoint", "layers.8"))
    assert "k is 99, expected at most d_sae" in said(train(chat, tmp_path / "b", "--k", "99"))
    for row, sentence in (
        ({"txt": 1}, "bad.jsonl line 2 has neither `messages` nor `text`"),
        ({"messages": []}, "bad.jsonl line 2: `messages` is empty"),
        ({"messages": [{"role": "user"}]}, "bad.jsonl line 2 is"),
        ({"messages": "hi"}, "bad.jsonl line 2 is 'hi'"),
    ):
        (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' + json.dumps(row))
        assert sentence in said(train(chat, tmp_path / "c", "--data", str(tmp_path / "bad.jsonl")))
    assert "cannot be read as UTF-8" in said(train(chat, tmp_path / "c", "--data", str(tmp_path)))
    assert "text file none.jsonl does not exist" in said(train(chat, tmp_path / "d", "--data", "none.jsonl"))
    assert "fewer than one batch" in said(train(chat, tmp_path / "e", "--batch-size", "100000"))
    assert main(train(chat, tmp_path / "f")) == 0
    assert "holds the work of another training run" in said(train(chat, tmp_path / "f", "--seed", "5"))
    assert "no SAE is at" in said(["sae", "eval", str(tmp_path / "none")])


def test_errors_are_json_too(tmp_path: Path) -> None:
    done = run("study", str(tmp_path / "none.toml"), "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["kind"] == "NotFoundError"
    assert done.stderr.startswith("demur: study file")


def test_nan_becomes_null_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from demur.cli.show import show_json

    show_json({"a": [float("nan"), 1.0]})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.0]}
