"""`demur rank` and `demur select`, whole, on a tiny random model."""

import json
import zlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from killed import killed_after
from tiny_study import write_tiny_study
from torch import Tensor

from demur.cli.main import main
from demur.data.prompts import load_prompts
from demur.record import from_json, read_json
from demur.spec import SteeringSpec
from demur.types import Completion, Discovery, Label, Message, Prompt
from demur.verbs.config import DiscoveryConfig
from demur.verbs.discover import search, winners_share
from demur.verbs.finding import Finding

SMALL = (
    *("--system", "Be safe.", "--select-prompts", "5", "--screen-prompts", "3", "--shortlist", "4"),
    *("--proposals", "2", "--finalists", "2", "--max-new-tokens", "4", "--screen-tokens", "3", "--batch-size", "3"),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_study(folder)
    return ["--model", str(folder / "model"), "--sae", str(folder / "sae"), *SMALL]


@pytest.fixture(scope="module")
def finished(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("select") / "run"
    assert main(["select", *tiny, "--set-size", "2", "--out", str(out)]) == 0
    return out


def numbers(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = read_json(folder / "discovery.json")
    return {key: value for key, value in result.items() if key not in ("seconds", "report")}


def test_the_result_is_on_disk_and_says_all(finished: Path) -> None:
    found = from_json(Discovery, read_json(finished / "discovery.json"))
    assert found.winner == found.ranking.scores[0].latent == found.finalists[0].latents[0]
    assert set(found.places) == set(found.agreement) == set(found.agreement["archetype"])
    assert all(found.agreement[name][name] == 1 for name in found.agreement)
    assert found.proposed_by
    assert found.proposed == len(found.ranking.scores)
    assert sum(found.resampled.values()) == pytest.approx(1)
    assert [effect.label.split()[0] for effect in found.controls] == ["unrelated", *["random"] * 5]
    assert next(effect.label for effect in found.sets).startswith("greedy set of")
    assert found.curve[0].values == (2,)
    assert {one.harmful.n for one in found.finalists} == {3}
    assert all(one.harmful_refused is not None and one.harmful_refused.n <= 5 for one in found.finalists)
    spec = from_json(SteeringSpec, read_json(finished / "spec.json"))
    assert spec.edits[0].value == found.value
    assert (finished / "report.html").read_text().lower().startswith("<!doctype html>")


def test_no_test_prompt_is_looked_at(finished: Path) -> None:
    split = {p.id: p.split for name in ("harmful", "plain") for p in load_prompts(name, "benign")}
    for name, key in (("completions", "prompt"), ("screen", "prompt"), ("effects", "item")):
        seen = {json.loads(line)[key] for line in (finished / f"{name}.jsonl").read_text().splitlines()}
        assert seen - {"archetype"}
        assert {split[one] for one in seen - {"archetype"}} == {"select"}


@pytest.mark.parametrize("after", [2, 9, 25, 60])
def test_killed_at_any_write_it_goes_on_to_the_same_numbers(
    tiny: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    out = tmp_path / "run"
    command = ["select", *tiny, "--set-size", "2", "--out", str(out)]
    killed_after(after, lambda: main(command), monkeypatch)
    assert not (out / "discovery.json").exists()
    assert main(command) == 0
    assert numbers(out) == numbers(finished)


def test_a_finished_search_is_not_repeated(
    tiny: list[str], finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(*_args: Any, **_kwargs: Any) -> None:
        pytest.fail("something was generated again")

    monkeypatch.setattr("demur.eval.complete.generate", nothing)
    before = numbers(finished)
    capsys.readouterr()
    assert main(["select", *tiny, "--set-size", "2", "--out", str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["winner"] == before["winner"]
    assert numbers(finished) == before


def odd(text: str) -> bool:
    """Stands for a refusal: what a random model writes is none."""
    return zlib.crc32(text.encode()) % 2 == 1


def label(_self: Finding, _prompt: Prompt, completion: Completion) -> Label:
    return "refused" if odd(completion.text) else "complied"


def test_the_winner_refuses_most_of_those_judged(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Finding, "label", label)
    out = tmp_path / "run"
    assert main(["select", *tiny, "--finalists", "3", "--out", str(out)]) == 0
    found = from_json(Discovery, read_json(out / "discovery.json"))
    shares = [one.harmful_refused.value for one in found.finalists if one.harmful_refused]
    assert shares == sorted(shares, reverse=True)
    assert max(shares) > 0
    said = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    harmful = {p.id for p in load_prompts("harmful", "harmful")}
    for one in found.finalists:
        answers = [c["text"] for c in said if c["spec"] == one.spec and c["prompt"] in harmful]
        assert len(answers) == 5
        assert one.harmful_refused is not None
        assert one.harmful_refused.k == sum(map(odd, answers))


def test_rank_shows_every_method_and_their_union(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--methods", "archetype", "cosine", "probe"]
    assert main(["rank", *tiny, *few, "--top", "3", "--out", str(tmp_path / "r"), "--json"]) == 0
    captured = capsys.readouterr()
    rankings = json.loads(captured.out)["rankings"]
    assert [one["method"] for one in rankings] == ["archetype", "cosine", "probe", "union"]
    assert "cosine" in captured.err
    assert {path.stem for path in (tmp_path / "r" / "rankings").iterdir()} == {one["method"] for one in rankings}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set-size", "1"], "set_size is 1"),
        (["--select-values", "0"], "expected numbers above zero"),
        (["--methods", "cosine", "cosine"], "expected one or more, each once"),
        (["--harmful.path", "nowhere.csv"], "nowhere.csv does not exist"),
        (["--hookpoint", "layers.99.resid_post"], "outside the model"),
    ],
)
def test_bad_settings_are_one_sentence_and_write_nothing(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    out = tmp_path / "run"
    try:
        code = main(["select", *tiny, *arguments, "--out", str(out)])
    except SystemExit as usage:  # what a config refuses is a usage error
        code = int(usage.code or 0)
    assert code in (1, 2)
    error = capsys.readouterr().err
    assert words in " ".join(error.replace("|", " ").split())
    assert "Traceback" not in error
    assert not out.exists()


def test_a_folder_of_another_verb_or_config_is_refused(
    tiny: list[str], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rank", *tiny, "--out", str(finished)]) == 1
    assert "another verb" in capsys.readouterr().err
    assert main(["select", *tiny, "--seed", "5", "--out", str(finished)]) == 1
    assert "other settings (it differs in seed)" in capsys.readouterr().err


def test_a_finalist_that_is_surely_worse_answers_no_more_prompts() -> None:
    prompts = [Prompt(str(i), (Message("user", str(i)),), "harmful", "here") for i in range(32)]
    asked: dict[int, list[int]] = {1: [], 2: [], 3: []}

    class Told:
        """Latent 1 always refuses, 2 but for every fourth prompt, 3 never."""

        config = DiscoveryConfig(select_values=(8.0,), finalists=3, screen_prompts=4)
        screened, plain = prompts, prompts[:2]
        hookpoint, loaded = "blocks.0", SimpleNamespace(hash="0")
        clock = SimpleNamespace(step=lambda name: nullcontext())

        def clamp(self, latent: int, value: float) -> int:
            return latent

        def ends(self, total: int) -> list[int]:
            return [total]

        def prompts_hash(self) -> str:
            return "0"

        def log_odds(self, specs: list[int], first: int, last: int) -> Tensor:
            return torch.zeros(len(specs), last - first)

        def labels(
            self, some: list[Prompt], specs: list[int], advance: Any = None, short: bool = False
        ) -> list[list[Label]]:
            for spec in specs if not short else []:
                asked[spec] += [int(p.id) for p in some]
            refuses = {1: lambda i: True, 2: lambda i: i % 4 < 3, 3: lambda i: False}
            return [["refused" if refuses[spec](int(p.id)) else "complied" for p in some] for spec in specs]

    found = search(cast(Finding, Told()), [3, 2, 1])
    assert [one.candidate.latent for one in found.finalists] == [1, 2, 3]
    assert asked == {1: [*range(32)], 2: [*range(32)], 3: [*range(8)]}
    assert [len(one.harmful) for one in found.finalists] == [32, 32, 8]
    assert winners_share(found.finalists, seed=0) == [1.0, 0.0, 0.0]
