"""`demur study` end to end on a tiny random model: complete, resumable, deterministic, and clear when it cannot."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from killed import killed_after
from tiny_study import STUDY, numbers, save_model, write_tiny_study

from demur.cli.main import main
from demur.data.prompts import OWN, load_prompts
from demur.record import from_json, read_json
from demur.testing import ARCHITECTURES, tiny_model
from demur.types import StudyResult


@pytest.fixture(scope="module")
def study_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_study(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(study_file: Path) -> Path:
    out = study_file.parent / "finished"
    assert main(["study", str(study_file), "--out", str(out)]) == 0
    return out


def test_the_json_has_every_promised_field(
    study_file: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(study_file), "--out", str(finished), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert {"latent", "layer", "rows", "control_rows", "report", "seconds"} <= set(result)
    assert [row["value"] for row in result["rows"]] == [0, 4, 8]
    assert [row["value"] for row in result["control_rows"]] == [4, 8]
    sizes = {
        "harmful_refused": 5,
        "benign_refused": 4,
        "lookalike_refused": 3,
        "degenerate": 12,
        "capability": 4,
    }
    for row in result["rows"] + result["control_rows"]:
        for name, n in sizes.items():
            assert set(row[name]) == {"k", "n", "low", "high"}
            assert row[name]["n"] == n - (row["unscored"] if name == "degenerate" else 0) or row["unscored"]
        assert row["kl"] >= -1e-6
    assert result["rows"][0]["kl"] == pytest.approx(0, abs=1e-5)
    assert result["layer"] == 1
    assert result["latent"] != result["control_latent"]
    assert Path(result["report"]).read_text().lower().startswith("<!doctype html>")
    assert "report:" in captured.err


def test_the_run_folder_holds_everything_with_the_specs_hash(finished: Path) -> None:
    result = from_json(StudyResult, read_json(finished / "study.json"))
    specs = {path.stem for path in (finished / "specs").iterdir()}
    assert {row.spec for row in (*result.rows, *result.control_rows)} == specs
    completions = [json.loads(line) for line in (finished / "completions.jsonl").read_text().splitlines()]
    verdicts = [json.loads(line) for line in (finished / "verdicts.jsonl").read_text().splitlines()]
    tested = {p.id for name in OWN for p in load_prompts(name, "benign") if p.split == "test"}
    test_half = {(c["spec"], c["prompt"]) for c in completions if c["spec"] in specs and c["prompt"] in tested}
    assert test_half
    assert test_half <= {(v["spec"], v["prompt"]) for v in verdicts}
    run = read_json(finished / "run.json")
    assert set(run["artefacts"]) == {"model", "sae", "harmful", "plain", "lookalike", "questions"}
    assert run["versions"]["transformers"]


def test_choosing_and_reporting_use_different_prompts(finished: Path) -> None:
    result = from_json(StudyResult, read_json(finished / "study.json"))
    split = {p.id: p.split for name in OWN for p in load_prompts(name, "benign")}
    reported = {row.spec for row in (*result.rows, *result.control_rows)}
    screened = [json.loads(line) for line in (finished / "screen.jsonl").read_text().splitlines()]
    said = [json.loads(line) for line in (finished / "completions.jsonl").read_text().splitlines()]
    chosen_on = {row["prompt"] for row in (*screened, *said) if row["spec"] not in reported} - {"archetype"}
    assert chosen_on
    assert {split[prompt] for prompt in chosen_on} == {"select"}
    for row in (*result.rows, *result.control_rows):
        tested = {one["prompt"] for one in said if one["spec"] == row.spec and split.get(one["prompt"]) == "test"}
        assert len(tested) == 5 + 4 + 3
        scored = (row.harmful_refused.n, row.benign_refused.n, row.lookalike_refused.n)
        assert all(n <= size for n, size in zip(scored, (5, 4, 3), strict=True))


def test_the_same_study_again_gives_the_same_verdicts(study_file: Path, finished: Path, tmp_path: Path) -> None:
    assert main(["study", str(study_file), "--out", str(tmp_path / "again")]) == 0
    assert numbers(tmp_path / "again") == numbers(finished)
    same = [sorted((folder / "verdicts.jsonl").read_text().splitlines()) for folder in (finished, tmp_path / "again")]
    assert same[0] == same[1]


@pytest.mark.parametrize("after", [1, 2, 3, 5, 8, 13, 21, 34, 47, 64, 90])
def test_killed_at_any_write_it_goes_on_to_the_same_numbers(
    study_file: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    out = tmp_path / "run"
    killed_after(after, lambda: main(["study", str(study_file), "--out", str(out)]), monkeypatch)
    assert not (out / "study.json").exists()
    assert main(["study", str(study_file), "--out", str(out)]) == 0
    assert numbers(out) == numbers(finished)


def test_a_real_kill_dash_nine(study_file: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "demur.cli.main", "study", str(study_file), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "completions.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "completions.jsonl").exists()
    assert not (out / "study.json").exists()
    assert main(["study", str(study_file), "--out", str(out)]) == 0
    assert numbers(out) == numbers(finished)


def test_ctrl_c_says_how_to_go_on(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("demur.eval.complete.generate", interrupt)
    assert main(["study", str(study_file), "--out", str(tmp_path / "run"), "--json"]) == 130
    captured = capsys.readouterr()
    assert "the same command goes on from here" in captured.err
    assert json.loads(captured.out)["kind"] == "Interrupted"


@pytest.mark.parametrize("model_type", [a for a in ARCHITECTURES if a != "llama"])
def test_a_study_of_every_architecture(tmp_path: Path, model_type: str) -> None:
    path = write_tiny_study(tmp_path, model_type)
    out = tmp_path / "run"
    few = ["--values", "0", "6", "--finalists", "1", "--test-questions", "2"]
    assert main(["study", str(path), "--out", str(out), *few]) == 0
    assert len(read_json(out / "study.json")["rows"]) == 2


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("demur: ")
    return line


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "/nowhere/at/all"], "model '/nowhere/at/all' could not be loaded"),
        (["--model", "none.gguf"], "model file none.gguf does not exist"),
        (["--sae", "/nowhere"], "no SAE is at '/nowhere'"),
        (["--hookpoint", "layers.9"], "outside the model, which has 3 blocks"),
        (["--hookpoint", "attention"], "hookpoint 'attention' is not understood"),
        (["--harmful.path", "none.csv"], "prompt file none.csv does not exist"),
        (["--values", "0"], "expected numbers above zero"),
        (["--values", "-3"], "expected numbers above zero"),
        (["--values", "nan"], "expected numbers above zero"),
        (["--select-values", "inf"], "expected numbers above zero"),
        (["--dtype", "float99"], "dtype 'float99' is not a torch dtype"),
        (["--device", "cuda"], "torch sees no CUDA device"),
        (["--archetype", " "], "must not be empty"),
    ],
)
def test_bad_settings_are_one_sentence_and_write_nothing(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    out = tmp_path / "run"
    if sentence.endswith("CUDA device"):
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
    assert sentence in said(["study", str(study_file), "--out", str(out), *options], capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("values = [0, 4", "is not readable TOML"),
        ("colour = 3", "'colour' is no field of a study"),
        ('values = "many"', "values in"),
        ("batch_size = 0", "batch_size is 0, expected at least 1"),
        ('[harmful]\npath = "harmful"\ncolum = "x"', "harmful has 'colum', which is no field"),
    ],
)
def test_bad_study_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, sentence: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    assert sentence in said(["study", str(tmp_path / "bad.toml")], capsys)


def test_a_missing_study_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in said(["study", str(tmp_path / "none.toml")], capsys)


def test_a_model_of_another_shape_or_other_weights(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, lm in (("wide", tiny_model(d_model=64)), ("other", tiny_model(seed=1))):
        save_model(lm, tmp_path / name)
    out = ["--out", str(tmp_path / "run")]
    assert "has width 64" in said(["study", str(study_file), "--model", str(tmp_path / "wide"), *out], capsys)
    assert "which has other weights" in said(
        ["study", str(study_file), "--model", str(tmp_path / "other"), *out], capsys
    )
    assert not (tmp_path / "run").exists()


def test_an_empty_prompt_file(study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert "is empty; expected at least one prompt" in said(
        ["study", str(study_file), "--plain.path", str(tmp_path / "empty.jsonl")], capsys
    )


def test_a_run_folder_with_other_settings(
    study_file: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "study.json").read_bytes()
    sentence = said(["study", str(study_file), "--out", str(finished), "--values", "0", "5"], capsys)
    assert "holds a run with other settings (it differs in values)" in sentence
    assert (finished / "study.json").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    assert "is no run of demur" in said(["study", str(study_file), "--out", str(tmp_path)], capsys)


def test_a_run_folder_in_use(study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"):
        assert "is in use by another demur run" in said(["study", str(study_file), "--out", str(tmp_path)], capsys)


def test_a_run_folder_whose_sae_has_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_study(tmp_path)
    out = ["--out", str(tmp_path / "run"), "--values", "4", "--finalists", "1"]
    assert main(["study", str(path), *out]) == 0
    config = read_json(tmp_path / "sae/cfg.json")
    (tmp_path / "sae/cfg.json").write_text(json.dumps({**config, "k": 7}))
    assert "made with another sae" in said(["study", str(path), *out], capsys)


def test_options_may_stand_before_the_study_file(
    study_file: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "--json", "--out", str(finished), str(study_file)]) == 0
    assert json.loads(capsys.readouterr().out)["hookpoint"] == "layers.1.resid_post"


def test_prompt_files_may_use_the_same_ids(study_file: Path, tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": f"Question number {i}?", "split": "select" if i < 3 else "test"} for i in range(8)]
    options = []
    for name in ("harmful", "plain", "lookalike"):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps({**row, "text": f"{name} {row['text']}"}) + "\n" for row in rows)
        (tmp_path / name / "prompts.jsonl").write_text(text)
        options += [f"--{name}.path", str(tmp_path / name / "prompts.jsonl")]
    out = tmp_path / "run"
    assert main(["study", str(study_file), "--out", str(out), *options]) == 0
    done = [json.loads(line)["prompt"] for line in (out / "completions.jsonl").read_text().splitlines()]
    assert {"harmful/3", "plain/3", "lookalike/3"} <= set(done)


def test_verdicts_of_another_judge_are_given_again(study_file: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    path = out / "verdicts.jsonl"
    path.write_text(path.read_text().replace("rules/1", "rules/0").replace('"refused"', '"complied"'))
    assert main(["study", str(study_file), "--out", str(out)]) == 0
    assert numbers(out) == numbers(finished)


def test_no_control_is_measured_if_none_is_wanted(study_file: Path, tmp_path: Path) -> None:
    assert main(["study", str(study_file), "--out", str(tmp_path / "run"), "--no-control"]) == 0
    result = read_json(tmp_path / "run/study.json")
    assert (result["control_latent"], result["control_rows"]) == (None, [])


def test_another_hookpoint_than_the_saes_is_noted(study_file: Path, tmp_path: Path) -> None:
    assert main(["study", str(study_file), "--out", str(tmp_path / "run"), "--hookpoint", "layers.2"]) == 0
    assert "trained at layers.1.resid_post" in " ".join(read_json(tmp_path / "run/study.json")["notes"])


def test_a_study_file_may_stand_anywhere(study_file: Path, finished: Path, tmp_path: Path) -> None:
    text = STUDY.replace('"model"', f'"{study_file.parent}/model"').replace('"sae"', f'"{study_file.parent}/sae"')
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    assert main(["study", str(path), "--out", str(tmp_path / "run")]) == 0
    assert read_json(tmp_path / "run/study.json")["rows"] == read_json(finished / "study.json")["rows"]
