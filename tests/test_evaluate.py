"""`demur eval`, `compare` and `reproduce`, whole, on a tiny random model."""

import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from killed import killed_after
from tiny_study import write_tiny_study

from demur.cli.main import main
from demur.record import from_json, read_json, read_jsonl
from demur.results import Evaluation
from demur.sae.store import load_sae
from demur.types import UNSTEERED, Completion, Prompt, Verdict

SUITES = ("--suite", "harmful:6", "plain:5", "--wrapper", "none", "base64")
PROMPTS = 2 * (6 + 5)
SMALL = ("--system", "Be safe.", "--max-new-tokens", "4", "--batch-size", "4", "--latent", "5", "--value", "4", "9")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_study(folder)
    text = folder / "text.jsonl"
    text.write_text(json.dumps({"text": "A short text to read, for perplexity."}) + "\n")
    return ["--model", str(folder / "model"), "--sae", str(folder / "sae"), "--text", str(text), *SMALL]


@pytest.fixture(scope="module", autouse=True)
def judged() -> Any:
    """What a random model writes is no refusal; here half of it stands for one."""
    from demur.judges.rules import RulesJudge

    def judge(self: RulesJudge, prompt: Prompt, completion: Completion) -> Verdict:
        odd = zlib.crc32(completion.text.encode()) % 2 == 1
        return Verdict(prompt.id, completion.spec, "refused" if odd else "complied", self.name)

    patch = pytest.MonkeyPatch()
    patch.setattr(RulesJudge, "judge", judge)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def finished(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "run"
    assert main(["eval", *SUITES, *tiny, "--out", str(out)]) == 0
    return out


def sae_hash(tiny: list[str]) -> str:
    return load_sae(tiny[tiny.index("--sae") + 1]).hash


def numbers(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = read_json(folder / "evaluation.json")
    for side in result["sides"]:
        side.pop("run")
    return {key: value for key, value in result.items() if key not in ("seconds", "report")}


def test_every_rate_is_the_verdicts_counted(finished: Path) -> None:
    found = from_json(Evaluation, read_json(finished / "evaluation.json"))
    assert [side.label for side in found.sides] == [UNSTEERED, "latent 5 at 4", "latent 5 at 9"]
    verdicts = read_jsonl(Verdict, finished / "verdicts.jsonl")
    prompts = {prompt.id: prompt for prompt in read_jsonl(Prompt, finished / "prompts.jsonl")}
    assert len(prompts) == PROMPTS
    for row in found.suites:
        some = [
            v.label
            for v in verdicts
            if v.spec == row.spec and (prompts[v.prompt].intent, prompts[v.prompt].wrapper) == (row.intent, row.wrapper)
        ]
        assert row.labels == Counter(some)
        assert (row.refused.k, row.refused.n) == (some.count("refused"), len(some))
    groups = {(row.intent, row.wrapper) for row in found.suites}
    assert groups == {(intent, wrapper) for intent in ("harmful", "benign") for wrapper in ("", "base64")}
    assert found.damage[0].kl.value == 0
    assert found.damage[1].kl.value > 0
    assert found.damage[1].perplexity.value != found.damage[0].perplexity.value
    assert found.limits == {"demur/harmful": 6, "demur/plain": 5}


@pytest.mark.parametrize("after", [4, 9, 16, 30])
def test_killed_at_any_write_it_goes_on_and_generates_nothing_twice(
    tiny: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    out = tmp_path / "run"
    command = ["eval", *SUITES, *tiny, "--out", str(out)]
    killed_after(after, lambda: main(command), monkeypatch)
    assert not (out / "evaluation.json").exists()
    assert main(command) == 0
    assert numbers(out) == numbers(finished)
    said = Counter((c.spec, c.prompt) for c in read_jsonl(Completion, out / "completions.jsonl"))
    assert set(said.values()) == {1}


def test_reused_completions_are_not_generated_again(
    tiny: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_args: Any, **_kwargs: Any) -> None:
        pytest.fail("something was generated again")

    monkeypatch.setattr("demur.eval.complete.generate", nothing)
    out = tmp_path / "again"
    fewer = [word for word in SUITES if word != "base64"]
    assert main(["eval", *fewer, *tiny, "--no-damage", "--reuse", str(finished), "--out", str(out)]) == 0
    assert len(read_jsonl(Completion, out / "completions.jsonl")) == 11 * 3


def test_settings_that_change_answers_are_not_reused(
    tiny: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [*tiny, "--max-new-tokens", "5", "--reuse", str(finished), "--out", str(tmp_path / "other")]
    assert main(["eval", *SUITES, *other]) == 1
    assert "max_new_tokens" in capsys.readouterr().err


def test_compare_counts_flips_both_ways(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(finished), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [one["steered"]["label"] for one in shown["comparisons"]] == ["latent 5 at 4", "latent 5 at 9"]
    verdicts = {(v.spec, v.prompt): v.label for v in read_jsonl(Verdict, finished / "verdicts.jsonl")}
    for one in shown["comparisons"]:
        for contrast in one["contrasts"]:
            if "refused" not in contrast["what"]:
                continue
            flips = {False: set(contrast["lost"]), True: set(contrast["won"])}
            for item in flips[True] | flips[False]:
                before, after = (verdicts[spec, item] for spec in (UNSTEERED, one["steered"]["spec"]))
                assert before != after
                assert item in flips[(after == "refused") == (contrast["better"] == "more")]
            assert contrast["p"] <= contrast["p_holm"] <= 1
            assert contrast["base"]["n"] + contrast["left_out"] in (6, 5)
    page = Path(shown["report"]).read_text()
    assert page.lower().startswith("<!doctype html>")


def test_a_run_against_itself_differs_in_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    side = f"{finished}@{UNSTEERED}"
    assert main(["compare", side, side, "--json", "--out", str(finished / "self.html")]) == 0
    found = json.loads(capsys.readouterr().out)["comparisons"][0]["contrasts"]
    assert all(one["difference"]["value"] == 0 and one["p"] == 1 for one in found)
    assert not any(one["won"] or one["lost"] for one in found)
    assert {one["verdict"] for one in found} == {"open"}


@pytest.mark.parametrize(("form", "has"), [("markdown", "| --- |"), ("latex", r"\toprule")])
def test_compare_prints_other_forms(
    finished: Path, capsys: pytest.CaptureFixture[str], form: str, has: str, tmp_path: Path
) -> None:
    assert main(["compare", str(finished), "--format", form, "--out", str(tmp_path / "page.html")]) == 0
    assert has.replace(" ", "") in capsys.readouterr().out.replace(" ", "")


def test_rates_are_corrected_for_a_judge_that_errs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = read_jsonl(Verdict, finished / "verdicts.jsonl")[0].judge
    file = tmp_path / "judge.json"
    page = ["--out", str(tmp_path / "page.html")]
    exact = {"judge": judge, "measures": "refusal", "tp": 10_000, "fn": 0, "tn": 10_000, "fp": 0}
    for table, changed in ((exact, False), ({**exact, "fn": 5_000}, True)):
        file.write_text(json.dumps(table))
        assert main(["compare", str(finished), "--correct", str(file), "--json", *page]) == 0
        shown = json.loads(capsys.readouterr().out)
        first = shown["comparisons"][0]["contrasts"][0]["base"]
        note = next(note for note in shown["notes"] if "corrected" in note)
        assert first["value"] > 0
        assert (f": {100 * first['value']:.1f} % [" in note) is not changed
    file.write_text(json.dumps({**exact, "judge": "other/1"}))
    assert main(["compare", str(finished), "--correct", str(file), *page]) == 1
    assert "other/1" in capsys.readouterr().err


def test_reproduce_finds_the_same_answers(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = finished / "reproduce.json"
    stored = read_json(file)
    stored["tasks"] = []
    stored["run"]["versions"]["torch"] = "1.0"
    changed = tmp_path / "reproduce.json"
    changed.write_text(json.dumps(stored))
    assert main(["reproduce", str(changed), "--out", str(tmp_path / "again"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["answers"] == shown["same_answers"] == shown["same_labels"] == PROMPTS * 3
    assert ["rounding", "torch"] in [[one["severity"], one["what"]] for one in shown["differences"]]


def test_a_judge_of_another_kind_judges_the_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", str(finished), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["judged"] == 0  # by the same rules, and answers to prompts of no suite are no business of a judge
    assert main(["compare", str(finished), "--judge", "wildguard", "--out", str(finished / "x.html")]) == 1
    assert "no verdicts of judge 'wildguard'" in capsys.readouterr().err


def test_a_kill_after_reuse_goes_on_with_the_same_batches(
    tiny: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tmp_path / "half"
    few = ["--suite", "harmful:3", "--no-damage"]
    assert main(["eval", *few, *tiny, "--out", str(half)]) == 0
    out = tmp_path / "run"
    command = ["eval", *SUITES, *tiny, "--out", str(out)]
    killed_after(9, lambda: main([*command, "--reuse", str(half)]), monkeypatch)
    assert main(command) == 0  # without --reuse: what was taken over stays so
    said = Counter((c.spec, c.prompt) for c in read_jsonl(Completion, out / "completions.jsonl"))
    assert set(said.values()) == {1}
    assert numbers(out)["suites"] == numbers(finished)["suites"]


def test_kl_knows_where_the_prompt_ends(tiny: list[str], tmp_path: Path) -> None:
    specs = []
    for where in ("all", "generation", "prompt"):
        spec = {
            "format": "demur-spec/1",
            "edits": [{"hookpoint": "layers.1.resid_post", "sae": sae_hash(tiny), "latents": [5], "value": 9}],
            "positions": {"where": where},
        }
        file = tmp_path / f"{where}.json"
        file.write_text(json.dumps(spec))
        specs.append(str(file))
    out = tmp_path / "run"
    wanted = tiny[: tiny.index("--latent")]
    assert main(["eval", "--suite", "plain:3", *wanted, "--spec", *specs, "--out", str(out)]) == 0
    _, whole, generation, prompt = from_json(Evaluation, read_json(out / "evaluation.json")).damage
    assert min(whole.kl.value, generation.kl.value, prompt.kl.value) > 0
    assert generation.kl_first.value == 0  # the first token follows the prompt, which is not steered
    assert prompt.kl_first.value == pytest.approx(whole.kl_first.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--suite", "plain", "plain:3"], "occurs in demur/plain and again"),
        (["--suite", "nothing-of-that-name"], "neither a prompt suite nor a file"),
        (["--suite", "harmful:0"], "limit 0"),
        (["--wrapper", "rot99"], "rot99"),
        (["--latent", "5000"], "numbered from 0"),
        (["--value", "4", "4"], "each may occur once"),
        (["--split", "train"], "expected test, select or all"),
    ],
)
def test_bad_settings_are_one_sentence_and_write_nothing(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    out = tmp_path / "run"
    try:
        code = main(["eval", *tiny, *more, "--out", str(out)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code in (1, 2)
    assert said in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_compare_wants_runs_of_eval(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path)]) == 1
    assert "no run folder" in capsys.readouterr().err
    assert main(["compare", f"{finished}@{UNSTEERED}"]) == 1
    assert "one side only" in capsys.readouterr().err
