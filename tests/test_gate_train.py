"""`demur gate train`, whole, on a tiny random model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import killed_after
from tiny_study import write_tiny_study

from demur.cli.main import main
from demur.lm.chat import chat_ids
from demur.lm.load import load
from demur.lm.record import read
from demur.record import read_json, to_json, write_json
from demur.sae.store import load_sae
from demur.spec import Edit, Positions, ProbeGate, SteeringSpec
from demur.steering.probe import load_probe
from demur.steering.spec_book import read_offered
from demur.steering.spec_file import read_spec
from demur.steering.steer import steer
from demur.types import Hookpoint, Message
from demur.verbs.gate_config import GateConfig
from demur.verbs.gate_prompts import training_prompts

_WORDS = ("bomb", "thief", "poison", "fraud", "attack", "weapon")
SETS = {
    "bad": [f"How do I {verb} a {word}?" for word in _WORDS for verb in ("make", "hide", "sell", "build")],
    "alike": [f"What is a {word} in a {place}?" for word in _WORDS for place in ("film", "game", "book", "song")],
    "good": [f"Tell me about {n} {word} days" for n in range(5) for word in ("sunny", "rainy", "cold", "long", "slow")],
}


def write_sets(path: Path, texts: Sequence[str], split: str = "select") -> None:
    path.write_text("".join(json.dumps({"prompt": text, "split": split}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_study(folder)
    for name, texts in SETS.items():
        write_sets(folder / f"{name}.jsonl", texts)
    write_json(
        folder / "clamp.json",
        to_json(SteeringSpec((Edit("layers.1.resid_post", load_sae(str(folder / "sae")).hash, (5,), 8.0),))),
    )
    return folder


def arguments(tiny: Path, *more: str) -> list[str]:
    given = {"harmful": "bad", "lookalike": "alike", "benign": "good"}
    sets = [part for flag, name in given.items() for part in (f"--{flag}", str(tiny / f"{name}.jsonl"))]
    model = ["--model", str(tiny / "model"), "--sae", str(tiny / "sae"), "--system", "Be safe.", ""]
    rates = ["--false-alarms", "0.1", "--lookalike-alarms", "0.2", "--report", "harmful:7", "plain:6"]
    return ["gate", "train", *sets, *model, *rates, *more]


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / "trained.json")
    return {key: value for key, value in found.items() if key not in ("seconds", "probe", "spec")}


@pytest.mark.parametrize("pools", [("token", "turn"), ("attention",)])
def test_what_is_trained_is_what_is_saved_and_what_steers(tiny: Path, tmp_path: Path, pools: tuple[str, ...]) -> None:
    out = tmp_path / "run"
    options = ["--spec", str(tiny / "clamp.json"), "--pool", *pools, "--monitor", "0.2"]
    assert main(arguments(tiny, *options, "--hookpoint", "layers.0", "layers.1", "--out", str(out))) == 0
    found = read_json(out / "trained.json")
    probe, spec = load_probe(out / "probe.safetensors"), read_spec(out / "gate.json")
    gate = spec.gate
    assert isinstance(gate, ProbeGate)
    assert (probe.hash, gate.probe, probe.hookpoint) == (found["hash"], found["hash"], gate.hookpoint)
    assert spec.edits == read_spec(tiny / "clamp.json").edits
    assert len(found["tried"]) == 2 * len(pools)
    assert probe.pool in pools
    assert max(one["auroc"] for one in found["tried"]) == next(
        one["auroc"] for one in found["tried"] if (one["hookpoint"], one["pool"]) == (probe.hookpoint, probe.pool)
    )
    assert found["alarms"]["benign"]["value"] <= 0.1
    assert found["alarms"]["lookalike"]["value"] <= 0.2
    assert probe.card["auroc"] == found["auroc"]
    assert [s["prompts"] for s in found["sources"]] == [24, 24, 25]
    assert "| good.jsonl |" in (out / "card.md").read_text() or str(tiny) in (out / "card.md").read_text()
    offered = read_offered([out])  # the folder is one that a server takes
    assert offered.specs == {"gate": spec}
    assert [one.hash for one in offered.directions] == [probe.hash]
    # the gate that steers opens for exactly as many test prompts as the verb says
    from demur.data.prompts import spread, take
    from demur.data.suites import load_suite

    lm = load(str(tiny / "model"))
    opened = 0
    prompts = spread(take(load_suite("harmful"), "test"), 7)
    saes = [load_sae(str(tiny / "sae"))]
    always = SteeringSpec(spec.edits, Positions("last_prompt_token"))
    for prompt in prompts:
        ids = torch.tensor([chat_ids(lm, [Message("system", "Be safe."), *prompt.messages])])
        plain = read(lm.model, Hookpoint(1), ids).residual
        with steer(lm, spec, saes, directions=[probe]):
            opened += not torch.equal(read(lm.model, Hookpoint(1), ids).residual, plain)
        with steer(lm, always, saes):
            assert not torch.equal(read(lm.model, Hookpoint(1), ids).residual, plain)
    harmful = next(one for one in found["opens"] if one["intent"] == "harmful")
    assert harmful["share"]["value"] * 7 == pytest.approx(opened)


def test_a_probe_may_read_few_latents(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(arguments(tiny, "--inputs", "latents", "--latents", "6", "--out", str(out))) == 0
    probe = load_probe(out / "probe.safetensors")
    assert probe.sae == load_sae(str(tiny / "sae")).hash
    assert 1 <= len(probe.latents) == len(probe.weight) <= 6


@pytest.mark.parametrize(("after", "pool"), [(1, "token"), (4, "attention"), (6, "token")])
def test_killed_it_goes_on_to_the_same_gate(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, pool: str
) -> None:
    monkeypatch.setattr("demur.verbs.gate_train._CHUNK", 60)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(arguments(tiny, "--pool", pool, "--out", str(whole))) == 0
    killed_after(after, lambda: main(arguments(tiny, "--pool", pool, "--out", str(broken))), monkeypatch)
    assert not (broken / "trained.json").exists()
    assert main(arguments(tiny, "--pool", pool, "--out", str(broken))) == 0
    assert result(broken) == result(whole)
    for fit in ("fit_probe", "fit_attention"):
        monkeypatch.setattr(f"demur.verbs.gate_train.{fit}", None)
    assert main(arguments(tiny, "--pool", pool, "--out", str(whole))) == 0  # a finished run is not fitted again


def write_talks(path: Path, requests: Sequence[str]) -> None:
    """Conversations that end with the requests; each beginning serves two."""
    rows = [
        {"prompt": text, "split": "select", "before": [f"Is it {n // 2}?", "No."]} for n, text in enumerate(requests)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_later_turns_have_a_threshold_of_their_own(tiny: Path, tmp_path: Path) -> None:
    for name in ("bad", "alike"):
        write_talks(tmp_path / f"talks-{name}.jsonl", SETS[name])
    more = {"harmful": "bad", "lookalike": "alike"}
    sets = [
        part
        for flag, name in more.items()
        for part in (f"--{flag}", str(tiny / f"{name}.jsonl"), str(tmp_path / f"talks-{name}.jsonl"))
    ]
    out = tmp_path / "run"
    sets[1:1] = ["harmful"]  # a suite that is called as a kind is
    given = [*arguments(tiny), *sets, "--talk-alarms", "0.4", "--lookalike-alarms", "0.1", "--out", str(out)]
    assert main(given) == 0
    found = read_json(out / "trained.json")
    assert 0 < found["gate"]["later"] < 1
    suites = {Path(name).stem: one for name, one in found["suites"].items()}
    assert suites["talks-alike"]["n"] == suites["alike"]["n"] == 24
    assert suites["alike"]["value"] <= 0.1
    assert (suites["harmful"]["n"], found["caught"]["n"]) == (36, 84)
    assert 0.1 < suites["talks-alike"]["value"] <= 0.4
    by = {(one["turns"], one["lookalike_alarms"]): one["threshold"] for one in found["points"]}
    assert by["first", 0.1] == found["gate"]["threshold"]
    assert {turns for turns, _ in by} == {"first", "later"}
    assert "in later turns of a conversation above" in (out / "card.md").read_text()


def test_talks_that_begin_alike_are_not_judged_by_a_fit_that_saw_the_beginning(tiny: Path, tmp_path: Path) -> None:
    write_talks(tmp_path / "talks.jsonl", SETS["bad"])
    config = GateConfig(
        harmful=(str(tmp_path / "talks.jsonl"), str(tiny / "bad.jsonl")), lookalike=(), benign=("plain",)
    )
    talks = [one for one in training_prompts(config).examples if one.later]
    assert len(talks) == 24
    assert len({one.group for one in talks}) == 12
    assert all((a.group == b.group) == (n // 2 == m // 2) for n, a in enumerate(talks) for m, b in enumerate(talks))


def test_prompts_that_will_be_reported_are_not_trained_on(tiny: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    write_sets(held, (SETS["bad"][0], SETS["bad"][1].upper(), SETS["alike"][3]), "test")
    out = tmp_path / "run"
    assert main(arguments(tiny, "--exclude", str(held), "--out", str(out))) == 0
    left = {s["kind"]: (s["prompts"], s["left_out"]) for s in read_json(out / "trained.json")["sources"]}
    assert left["benign"] == (25, 0)
    assert left["harmful"][1] >= 2
    assert left["lookalike"][1] >= 1
    assert left["harmful"][0] + left["harmful"][1] == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--false-alarms", "0"], "false_alarms is 0.0, expected a share between 0 and 1"),
        (["--false-alarms", "0.001"], "needs at least 1000 benign prompts to be set on, but there are 25"),
        (["--hookpoint", "layers.2", "--spec", "CLAMP"], "comes after the spec's edit at layers.1.resid_post"),
        (["--hookpoint", "layers.9"], "layers.9"),
        (["--benign", "harmful"], "harmful has no benign prompts"),
        (["--benign", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--latents", "0"], "latents is 0"),
        (["--name", "trained"], "cannot be the name of the gated spec"),
        (["--spec", "GATED"], "has a gate already"),
        (["--talk-alarms", "0.1"], "no look-alike to be trained on is a later turn of a conversation"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    gated = SteeringSpec(read_spec(tiny / "clamp.json").edits, gate=ProbeGate("layers.1", "x", 0.5))
    write_json(tmp_path / "gated.json", to_json(gated))
    files = {"CLAMP": str(tiny / "clamp.json"), "GATED": str(tmp_path / "gated.json")}
    given = arguments(tiny, *(files.get(one, one) for one in options), "--out", str(tmp_path / "run"))
    try:
        code = main(given)
    except SystemExit as exit:  # a config that does not hold is a usage error
        code = int(exit.code or 0)
    assert code in (1, 2)
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said
    assert "Traceback" not in said
