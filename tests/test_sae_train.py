"""`demur sae train` on a tiny model: one SAE or several, interrupted, in two processes, with bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_study import save_model

from demur.cli.main import main
from demur.data.corpus import Corpus
from demur.sae.store import load_sae
from demur.testing import tiny_model


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


@pytest.mark.parametrize("source", ["disk", "stream"])
def test_training_interrupted_anywhere_ends_with_the_same_weights(
    source: str, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import demur.record
    import demur.verbs.sae_train as verb

    monkeypatch.setattr(verb, "_CHECKPOINT_STEPS", 10)
    more = ["--source", source, "--pool-tokens", "500", "--evaluations", "1"]
    assert main(train(chat, tmp_path / "whole", *more)) == 0
    whole = (tmp_path / "whole/sae.safetensors").read_bytes()
    real = demur.record.os.fsync

    class Killed(BaseException):
        pass

    for after in (1, 3, 6, 9, 11) if source == "disk" else (1, 4, 5, 7):
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
                main(train(chat, out, *more))
        assert main(train(chat, out, *more)) == 0
        assert (out / "sae.safetensors").read_bytes() == whole


def test_several_saes_in_one_pass_are_those_trained_alone(chat: Path, tmp_path: Path) -> None:
    more = ["--hookpoint", "layers.0", "layers.1", "--k", "4", "8", "--architecture", "batchtopk"]
    assert main(train(chat, tmp_path / "all", *more)) == 0
    made = sorted(str(p.parent.relative_to(tmp_path / "all")) for p in (tmp_path / "all").glob("*/*/cfg.json"))
    assert made == [f"layers.{b}.resid_post/batchtopk-64-{k}" for b in (0, 1) for k in (4, 8)]
    lines = [json.loads(line) for line in (tmp_path / "all/work/train.jsonl").read_text().splitlines()]
    assert {(line["hookpoint"], line["sae"]) for line in lines} == {tuple(path.split("/")) for path in made}
    looked = [line["heldout"] for line in lines if "heldout" in line]
    assert len(looked) == 16
    assert {"fvu", "l0", "dead", "ce_recovered", "kl", "l2_ratio", "fvu_user", "fvu_template"} <= set(looked[0])
    one = load_sae(tmp_path / "all/layers.1.resid_post/batchtopk-64-8")
    assert (one.config.architecture, one.config.training["trained_as"]) == ("batchtopk", "batchtopk")
    assert main(["sae", "eval", one.path, "--data", str(chat / "chat.jsonl")]) == 0


def test_two_processes_harvest_and_train_as_one(chat: Path, tmp_path: Path) -> None:
    for source in ("disk", "stream"):
        for size in (1, 2):
            out = tmp_path / f"{source}-{size}"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", "-m"]
            arguments = train(chat, out, "--source", source, "--pool-tokens", "500", "--evaluations", "0")
            done = subprocess.run([*command, "demur.cli.main", *arguments], capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
        one, two = (load_sae(tmp_path / f"{source}-{size}").sae for size in (1, 2))
        for name, value in one.state_dict().items():
            torch.testing.assert_close(value, two.state_dict()[name], atol=2e-3, rtol=2e-2)


def test_text_is_mixed_by_weight(tmp_path: Path) -> None:
    for name, count in (("a", 400), ("b", 400)):
        rows = [{"text": f"{name} " * 20} for _ in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    mixed = [document.source for document in Corpus(files, (3, 1), seed=1)]
    assert mixed.count("a") == 400  # until the first file is used up
    assert mixed.count("b") in (133, 134)
    assert mixed[:100].count("a") in (74, 75, 76)
    whole = [document.text for document in Corpus(files, seed=1)]
    assert len(whole) == 800
    assert whole == [document.text for document in Corpus(files, seed=1)] != sorted(whole)


def test_a_shard_or_checkpoint_cut_short_is_one_sentence(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train(chat, tmp_path / "sae")) == 0
    for name, sentence in (
        ("train/shard-00000.safetensors", "is not a whole shard"),
        ("checkpoint.safetensors", "is not a whole checkpoint"),
    ):
        path = tmp_path / "sae/work" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-9])
        capsys.readouterr()
        assert main(train(chat, tmp_path / "sae")) == 1
        assert sentence in capsys.readouterr().err.splitlines()[-1]
        path.write_bytes(whole)
    before = load_sae(tmp_path / "sae").hash
    assert main(train(chat, tmp_path / "sae")) == 0
    assert load_sae(tmp_path / "sae").hash == before


def test_tensorboard_is_an_extra(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        assert main(train(chat, tmp_path / "sae", "--tensorboard")) == 1
        assert "pip install 'demur[tensorboard]'" in capsys.readouterr().err
    else:
        assert main(train(chat, tmp_path / "sae", "--tensorboard")) == 0
        assert list((tmp_path / "sae/tensorboard").glob("events*"))


def test_bad_training_input(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(arguments: list[str]) -> str:
        assert main(arguments) == 1
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "outside the model" in said(train(chat, tmp_path / "a", "--hookpoint", "layers.8"))
    with pytest.raises(SystemExit):
        main(train(chat, tmp_path / "b", "--k", "99"))
    assert "k is 99, expected at most d_sae = 64" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(train(chat, tmp_path / "b", "--k", "4", "4"))
    assert "k is 4, 4, expected one or more, each once" in capsys.readouterr().err
    for row, sentence in (
        ({"txt": 1}, "bad.jsonl line 2 has neither `messages` nor `text`"),
        ({"messages": []}, "bad.jsonl line 2: `messages` is empty"),
        ({"messages": [{"role": "user"}]}, "bad.jsonl line 2 is"),
        ({"messages": "hi"}, "bad.jsonl line 2 is 'hi'"),
    ):
        (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' + json.dumps(row))
        assert sentence in said(train(chat, tmp_path / "c", "--data", str(tmp_path / "bad.jsonl")))
    assert "cannot be read (Is a directory)" in said(train(chat, tmp_path / "c", "--data", str(tmp_path)))
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "\xff"}')
    assert "bad.jsonl line 1 is not UTF-8 text" in said(train(chat, tmp_path / "c", "--data", f"{tmp_path}/bad.jsonl"))
    assert "expected one above 0 for each of 1 text files" in said(train(chat, tmp_path / "c", "--weights", "1", "2"))
    assert "text file none.jsonl does not exist" in said(train(chat, tmp_path / "d", "--data", "none.jsonl"))
    assert "fewer than one batch" in said(train(chat, tmp_path / "e", "--batch-size", "100000"))
    assert main(train(chat, tmp_path / "f")) == 0
    assert "holds the work of another training run" in said(train(chat, tmp_path / "f", "--seed", "5"))
    assert "no SAE is at" in said(["sae", "eval", str(tmp_path / "none")])


def test_a_model_that_gives_nan_is_one_sentence(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tiny_model()
    with torch.no_grad():
        next(iter(broken.model.get_decoder().layers[0].parameters())).fill_(torch.nan)
    save_model(broken, tmp_path / "broken")
    for source in ("disk", "stream"):
        arguments = train(chat, tmp_path / source, "--model", str(tmp_path / "broken"), "--source", source)
        assert main(arguments) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert "gives NaN or infinity at layers.1.resid_post in torch.float32; load it in bfloat16 or float32" in said
