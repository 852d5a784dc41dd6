"""The real thing: the embedded model and SAE, as a user runs them. The first run downloads the model (93 MB)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from demur.judges.rules import read
from demur.record import read_json
from demur.sae.store import EMBEDDED, load_sae

pytestmark = pytest.mark.real
NAME = "smollm2-135m-instruct"


def demur(*arguments: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "demur.cli.main", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_the_embedded_sae_is_what_its_card_says() -> None:
    loaded = load_sae(NAME)
    folder = EMBEDDED / NAME
    assert (loaded.config.k, loaded.config.d_sae, loaded.config.d_in) == (32, 4608, 576)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12e6
    metrics = loaded.config.metrics
    assert metrics["fvu"] <= 0.22
    assert metrics["dead"] <= 0.05
    card = (folder / "README.md").read_text()
    for word in ("MIT", "Apache-2.0", "CDLA-Sharing-1.0", "FVU", "CE recovered", "demur sae train", "seed"):
        assert word in card
    norms = loaded.sae.W_dec.norm(dim=1)
    assert float(norms.std() / norms.mean()) < 0.01


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "run"
    demur("study", "--quick", "--out", str(out))
    return out


def test_a_quick_study_finds_the_gain_and_the_cost(quick: Path) -> None:
    result = read_json(quick / "study.json")
    rows = {row["value"]: row for row in result["rows"]}
    assert set(rows) == {0, 8, 12}
    assert rows[0]["harmful_refused"]["n"] >= 24
    share = {value: row["harmful_refused"]["k"] / row["harmful_refused"]["n"] for value, row in rows.items()}
    assert max(share[8], share[12]) - share[0] > 0.35  # 30 prompts, 18 tokens; the default study: docs/log.md
    assert result["best_gain_low"] > 0
    assert rows[12]["kl"] > rows[8]["kl"] > rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    chance = 1 / 4
    assert rows[0]["capability"]["low"] > chance + 0.1
    assert (quick / "report.html").stat().st_size > 1e6


def test_it_is_the_refusals_latent_and_not_any_latent(quick: Path) -> None:
    result = read_json(quick / "study.json")
    best = {row["value"]: row["harmful_refused"] for row in result["rows"]}[result["best_value"]]
    control = {row["value"]: row["harmful_refused"] for row in result["control_rows"]}[result["best_value"]]
    assert control["high"] < best["low"]


def test_the_readmes_python_runs_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out.strip().splitlines()
    assert read(said[0]).label == "complied"
    assert read(said[-1]).label == "refused"
