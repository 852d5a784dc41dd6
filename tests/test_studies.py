"""The study files that ship: the default is the default, and the paper's run on tiny models of their architectures."""

import csv
from pathlib import Path

import pytest
from tiny_study import save_model

from demur.cli.main import main
from demur.data.prompts import load_prompts
from demur.record import read_json
from demur.sae.store import SaeConfig, SaeModel, save_sae
from demur.testing import tiny_model, tiny_sae
from demur.verbs.config import StudyConfig
from demur.verbs.read_study import read_study

STUDIES = Path(__file__).parents[1] / "studies"


def test_the_default_study_is_written_out_in_its_file() -> None:
    assert read_study(STUDIES / "smollm2-135m-instruct.toml") == StudyConfig()


def test_large_studies_say_what_they_need() -> None:
    for path in STUDIES.glob("*-paper.toml"):
        study = read_study(path)
        assert {10, 12} <= set(study.values)
        assert study.control
        for word in ("GPU", "hours", "gated"):
            assert word in study.needs


@pytest.mark.parametrize(("name", "model_type"), [("phi3-mini-paper", "phi3"), ("llama31-8b-paper", "llama")])
def test_the_papers_studies_run_on_tiny_models(tmp_path: Path, name: str, model_type: str) -> None:
    original = read_study(STUDIES / f"{name}.toml")
    text = (STUDIES / f"{name}.toml").read_text()
    block = int(original.hookpoint.split(".")[1])
    lm = tiny_model(model_type, blocks=block + 2, name=original.model)
    save_model(lm, tmp_path / "model")
    made_for = SaeModel(lm.name, lm.fingerprint, lm.n_blocks)
    save_sae(tmp_path / original.sae, tiny_sae(), SaeConfig(32, 96, 8, original.hookpoint, made_for))
    (tmp_path / f"{name}.toml").write_text(text)
    (tmp_path / "data").mkdir()
    for field, own in (("harmful", "harmful"), ("plain", "plain"), ("lookalike", "lookalike")):
        with (tmp_path / getattr(original, field).path).open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["prompt"])
            rows.writerows([p.text] for p in load_prompts(own, "benign")[:12])
    out = tmp_path / "run"
    small = [
        "--model",
        str(tmp_path / "model"),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--max-new-tokens",
        "3",
    ]
    small += ["--screen-prompts", "2", "--finalists", "1", "--test-questions", "2"]
    assert main(["study", str(tmp_path / f"{name}.toml"), "--out", str(out), *small]) == 0
    result = read_json(out / "study.json")
    assert [row["value"] for row in result["rows"]] == [0, 10, 12]
    assert len(result["control_rows"]) == 2
    assert result["layer"] == block


def test_whole_numbers_and_fractions_are_one_setting() -> None:
    from demur.verbs.study import config_hash

    assert config_hash(StudyConfig()) == config_hash(read_study(STUDIES / "smollm2-135m-instruct.toml"))
    assert config_hash(StudyConfig(values=(0, 4))) == config_hash(StudyConfig(values=(0.0, 4.0)))
