"""The command line: fast help, one JSON object, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


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


def test_errors_are_json_too(tmp_path: Path) -> None:
    done = run("study", str(tmp_path / "none.toml"), "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["kind"] == "NotFoundError"
    assert done.stderr.startswith("demur: study file")


def test_nan_becomes_null_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from demur.cli.show import show_json

    show_json({"a": [float("nan"), 1.0]})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.0]}
