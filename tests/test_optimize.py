"""`demur optimize`, whole, on a tiny random model: the search, its front, kills, several workers, what is picked."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killed import killed_after
from scipy.stats import ttest_rel
from tiny_study import write_tiny_study

from demur.cli.main import main
from demur.data.prompts import load_prompts, load_questions
from demur.eval import complete
from demur.eval.front import Look, front, prune, values
from demur.judges.rules import RulesJudge
from demur.lm.load import LanguageModel
from demur.record import from_json, read_json, read_jsonl, to_json
from demur.report.optimize import COLUMNS, front_table, hover, render, summary
from demur.results import Optimized, Tried
from demur.spec import Edit, LatentGate, Positions, ProbeGate, SteeringSpec
from demur.steering.probe import Probe, load_probe, save_probe
from demur.steering.spec_file import read_spec
from demur.types import UNSTEERED, Completion, Estimate, Measurement, Prompt, Rate, Run, Verdict
from demur.verbs import optimize as verb
from demur.verbs import optimize_study
from demur.verbs.optimize_config import OptimizeConfig
from demur.verbs.optimize_space import Layer, ProbeAt, Space, choose, words
from demur.verbs.optimize_study import JOURNAL, Trials
from demur.verbs.optimizing import begin

SMALL = (
    *("--system", "Be safe.", "--suite", "harmful:5", "lookalike:3", "plain:3", "--max-new-tokens", "4"),
    *("--screen-prompts", "4", "--questions", "4", "--batch-size", "4", "--startup", "6", "--inert", "0.02"),
    *("--most-kl", "9", "--damage-prompts", "4", "--latents", "5", "17", "40", "--gate-latents", "7", "11"),
)
TRIALS = 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_study(folder)
    weight = torch.randn(32, generator=torch.Generator().manual_seed(9))
    save_probe(folder / "probe.safetensors", Probe(weight, 0.1, "layers.0.resid_post"))
    files = ["--model", str(folder / "model"), "--sae", str(folder / "sae")]
    return [*files, "--probe", str(folder / "probe.safetensors"), *SMALL]


def odd(text: str) -> bool:
    return zlib.crc32(text.encode()) % 2 == 1


@pytest.fixture(scope="module", autouse=True)
def judged() -> Iterator[None]:
    """What a random model writes is no refusal; here half of it stands for one, and some of the rest is broken."""

    def judge(self: RulesJudge, prompt: Prompt, completion: Completion) -> Verdict:
        label = "refused" if odd(completion.text) else "degenerate" if odd(completion.text[1:]) else "complied"
        return Verdict(prompt.id, completion.spec, label, self.name)  # type: ignore[arg-type]

    patch = pytest.MonkeyPatch()
    patch.setattr(RulesJudge, "judge", judge)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def finished(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("optimize") / "run"
    assert main(["optimize", *tiny, "--trials", str(TRIALS), "--out", str(out)]) == 0
    return out


def result(folder: Path) -> Optimized:
    return from_json(Optimized, read_json(folder / "optimize.json"))


def trials(folder: Path) -> list[Any]:
    return Trials(folder, 3, 0, 6).finished()


def chosen(folder: Path) -> list[dict[str, Any]]:
    return [trial.params for trial in trials(folder)]


def code_of(command: list[str]) -> int:
    try:
        return main(command)
    except SystemExit as stop:
        return int(stop.code or 0)


def said_twice(folder: Path) -> int:
    """Completions that a spec has more than one of for a prompt."""
    said: Counter[tuple[str, str]] = Counter()
    for path in (folder / "specs").glob("*/completions.jsonl"):
        said.update((one.spec, one.prompt) for one in read_jsonl(Completion, path))
    assert said
    return sum(n > 1 for n in said.values())


# --- the front and the rule that prunes -----------------------------------------------------------


points = st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan")])] * 3), max_size=12)


@given(points)
def test_the_front_is_what_nothing_beats(some: list[tuple[float, ...]]) -> None:
    table = np.array(some).reshape(-1, 3)
    wanted = []
    for i, point in enumerate(table):
        if np.isnan(point).any():
            continue
        known = table[~np.isnan(table).any(1)]
        beaten = ((known <= point).all(1) & (known < point).any(1)).any()
        if not beaten:
            wanted.append(i)
    assert front(some) == wanted


def surely(low: Sequence[float], high: Sequence[float]) -> bool:
    """scipy's paired interval of `low` - `high` lies below 0."""
    if np.allclose(np.subtract(low, high), np.subtract(low, high)[0]):
        return bool(low[0] < high[0])
    return bool(ttest_rel(low, high).confidence_interval(0.95).high < 0)


@given(st.integers(0, 400))
def test_the_screen_prunes_by_its_stated_rule(seed: int) -> None:
    draw = np.random.default_rng(seed)

    def look() -> Look:
        centre = draw.normal([0.8, 0.5, 0.4], 0.7)
        return Look(*(draw.normal(c, 0.5, 6).tolist() for c in centre))

    mine, others = look(), [look() for _ in range(4)]
    wanted = None
    if np.mean(mine.harmful) < 0.1:
        wanted = "inert"
    elif np.mean(mine.kl) > 1.0:
        wanted = "broken"
    elif any(
        surely(mine.harmful, one.harmful) and surely(one.benign, mine.benign) and surely(one.kl, mine.kl)
        for one in others
    ):
        wanted = "dominated"
    assert prune(mine, others, 0.1, 1.0) == wanted


def test_every_rule_prunes_something() -> None:
    good = Look([2.0, 2.1, 1.9, 2.2, 2.0], [0.1, 0.2, 0.1, 0.0, 0.1], [0.1, 0.2, 0.1, 0.1, 0.15])
    worse = Look([1.0, 1.1, 0.9, 1.0, 1.2], [0.9, 1.0, 1.1, 0.9, 1.0], [0.5, 0.6, 0.5, 0.4, 0.5])
    assert prune(worse, [good], 0.1, 1.0) == "dominated"
    assert prune(worse, [], 0.1, 1.0) is None
    assert prune(good, [worse], 0.1, 1.0) is None
    assert prune(worse._replace(kl=good.kl), [good], 0.1, 1.0) is None  # as cheap, so it may yet be worth it
    assert prune(worse, [good], 1.5, 1.0) == "inert"
    assert prune(worse, [good], 0.1, 0.2) == "broken"


def test_broken_text_is_no_answer_and_no_refusal() -> None:
    none, all_of_it = Rate(0, 10, 0, 0.3), Rate(10, 10, 0.7, 1)
    broken = Tried(1, "", "x", none, none, all_of_it, all_of_it, all_of_it, 0, Estimate(0.5, 0, 1, 3), none)
    fine = replace(broken, benign_degenerate=none, benign_lost=none, capability=all_of_it)
    assert values(broken, fine, ("harmful", "benign", "kl", "capability")) == (1, 1, 0.5, 1)
    assert values(fine, fine, ("harmful", "benign")) == (1, 0)


# --- the search -----------------------------------------------------------------------------------


def test_the_front_is_that_of_what_was_measured(finished: Path) -> None:
    found = result(finished)
    every = [found.unsteered, *found.front, *found.others]
    measured = [values(one, found.unsteered, found.objectives) for one in every]
    beaten = {
        one.spec
        for one, mine in zip(every, measured, strict=True)
        if any(all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for other in measured)
    }
    assert {one.spec for one in found.front} == {one.spec for one in every[1:]} - beaten
    assert found.front
    assert len(every) - 1 + sum(found.pruned.values()) == TRIALS
    assert found.pruned  # else the screen was never asked
    harmful = {p.id for p in load_prompts("harmful", "harmful")}
    for one in every:
        folder = finished / "specs" / one.spec
        said = read_jsonl(Completion, folder / "completions.jsonl")
        refused = [odd(answer.text) for answer in said if answer.prompt in harmful]
        assert (one.harmful_refused.k, one.harmful_refused.n) == (sum(refused), 5)
        kl = [row.value for row in read_jsonl(Measurement, folder / "measurements.jsonl") if row.name == "kl"]
        assert one.kl.value == pytest.approx(sum(kl) / len(kl))
        assert one.benign_lost.k == one.benign_refused.k + one.benign_degenerate.k
    assert found.unsteered.kl.value == 0
    assert max(one.kl.value for one in found.front) > 0


def test_a_trial_that_changes_nothing_is_not_on_the_front(finished: Path) -> None:
    found = result(finished)
    same = replace(found.unsteered, number=0, label="shut", spec="shut")
    better = replace(same, number=1, spec="better", harmful_refused=Rate(5, 5, 0.5, 1))
    told = [
        SimpleNamespace(values=[0.0], user_attrs={"tried": to_json(one)})
        for one in (same, better, replace(better, number=2))
    ]
    going: Any = SimpleNamespace(
        config=OptimizeConfig(),
        unsteered=found.unsteered,
        findings=[],
        judge=RulesJudge(),
        clock=SimpleNamespace(seconds=dict),
    )
    trials: Any = SimpleNamespace(finished=lambda: told, unfinished=lambda: 0)
    run: Any = SimpleNamespace(name="x", artefacts={"model": "m"})
    here = verb._result(going, trials, run)
    assert (here.front, here.others) == ((better,), (same,))  # and one spec is one point
    assert not here.notes
    told.pop()
    told.pop()
    assert "beats the unsteered model" in verb._result(going, trials, run).notes[0]


def test_nothing_is_generated_for_a_pruned_trial(finished: Path) -> None:
    answered = {path.parent.name for path in (finished / "specs").glob("*/completions.jsonl")}
    pruned = {trial.user_attrs["spec"] for trial in trials(finished) if "pruned" in trial.user_attrs}
    complete = {trial.user_attrs["spec"] for trial in trials(finished) if trial.values}
    assert answered == complete | {UNSTEERED}
    assert pruned - complete


def test_no_test_prompt_is_looked_at(finished: Path) -> None:
    split = {p.id: p.split for name in ("harmful", "lookalike", "plain") for p in load_prompts(name, "benign")}
    split |= {q.id: q.split for q in load_questions()}
    seen = {
        json.loads(line)["prompt"]
        for f in finished.glob("*/*/completions.jsonl")
        for line in f.read_text().splitlines()
    }
    seen |= {
        json.loads(line)["item"] for f in finished.glob("*/*/measurements.jsonl") for line in f.read_text().splitlines()
    }
    assert {split[one] for one in seen - {"archetype"}} == {"select"}


@pytest.mark.parametrize("after", [9, 60])
def test_killed_at_any_write_it_goes_on_to_the_same_front(
    tiny: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    out = tmp_path / "run"
    command = ["optimize", *tiny, "--trials", str(TRIALS), "--out", str(out)]
    killed_after(after, lambda: main(command), monkeypatch)
    assert not (out / "optimize.json").exists()
    if (out / JOURNAL).exists():
        with (out / JOURNAL).open("ab") as file:
            file.write(b'{"op_code": 4, "worker')  # and what a kill may leave of a line
    assert main(command) == 0
    assert chosen(out) == chosen(finished)
    assert not said_twice(out)
    here, there = ([replace(one, number=0) for one in result(folder).front] for folder in (out, finished))
    assert here == there


def test_more_trials_are_added_to_those_that_are_there(
    tiny: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert main(["optimize", *tiny, "--trials", "5", "--out", str(out)]) == 0
    assert chosen(out) == chosen(finished)[:5]
    assert main(["optimize", str(out), "--trials", str(TRIALS)]) == 0
    assert chosen(out) == chosen(finished)

    def nothing(*_args: Any, **_kwargs: Any) -> None:
        pytest.fail("something was generated again")

    monkeypatch.setattr("demur.eval.complete.generate", nothing)
    assert main(["optimize", str(out), "--trials", "3"]) == 0  # it has more
    assert len(trials(out)) == TRIALS


def test_where_the_gate_stays_shut_nothing_is_generated(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = from_json(OptimizeConfig, read_json(finished / "run.json")["config"])
    going, _ = begin(config, finished)
    layer = going.space.layers[0]
    edit = Edit(layer.hookpoint, layer.sae, (5,), 9.0)
    last = Positions("last_prompt_token")
    shut = SteeringSpec((edit,), gate=LatentGate(layer.hookpoint, layer.sae, 7, 1e6, positions=last))
    half = SteeringSpec((edit,), gate=LatentGate(layer.hookpoint, layer.sae, 52, 0.1, positions=last))
    going.base.all()
    here = replace(going, folder=tmp_path)
    here.__dict__["base"] = going.base
    asked: list[int] = []
    real = complete.generate

    def count(lm: LanguageModel, rows: Sequence[Any], limit: int) -> Any:
        asked.append(len(rows))
        return real(lm, rows, limit)

    monkeypatch.setattr(complete, "generate", count)
    same = here.judged(shut, 1)
    assert not asked
    assert replace(same, number=-1, label=UNSTEERED, spec=UNSTEERED) == result(finished).unsteered
    here.judged(half, 2)
    assert 0 < sum(asked) < 11


# --- several processes ----------------------------------------------------------------------------


def test_two_workers_share_one_study(tiny: list[str], finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = from_json(OptimizeConfig, read_json(finished / "run.json")["config"])
    first, _ = begin(config, out)
    first.prepare()
    second, _ = begin(config, out)
    workers = [
        threading.Thread(target=verb._work, args=(one, Trials(out, 3, 0, 6), TRIALS, False)) for one in (first, second)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = trials(out)
    assert [trial.number for trial in found] == list(range(TRIALS))
    assert not said_twice(out)
    assert len({json.dumps(trial.params, sort_keys=True) for trial in found[:6]}) == 6  # none drew what another had
    assert all("look" in trial.user_attrs for trial in found)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_killed_with_its_workers_it_loses_no_finished_trial(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["optimize", *tiny, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "demur.cli.main", *command, "--trials", "500", "--workers", "2"],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 400  # on a machine that is busy with other things, too
        while not (out / JOURNAL).exists() or '"state":1' not in (out / JOURNAL).read_text():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        workers = children(process.pid)
        assert len(workers) >= 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    while any(map(alive, workers)):  # they end with the one that started them
        assert time.monotonic() < end
        time.sleep(0.1)
    before = {trial.number: trial.params for trial in trials(out)}
    assert before
    total = len(before) + 2
    assert main([*command, "--trials", str(total)]) == 0
    after = {trial.number: trial.params for trial in trials(out)}
    assert len(after) == total
    assert before.items() <= after.items()
    assert not said_twice(out)


# --- from a trial to a spec -----------------------------------------------------------------------


class Fixed:
    """A trial whose choices are made; says which were asked for."""

    def __init__(self, **made: Any) -> None:
        self.made, self.asked = {name.replace("_", " "): value for name, value in made.items()}, set[str]()

    def _of(self, name: str) -> Any:
        self.asked.add(name)
        return self.made[name.replace("_", " ")]

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        value = self._of(name)
        assert value in choices
        return value

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        assert low <= self.made[name.replace("_", " ")] <= high
        return int(self._of(name))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        assert low <= self.made[name] <= high
        return float(self._of(name))


SPACE = Space(
    (
        Layer("layers.1.resid_post", "s", (5, 17), {7: 2.0}),
        Layer("layers.2.resid_post", "t", (3, 8), {}),
    ),
    (ProbeAt("layers.2.resid_post", "abcdef0123"),),
)


def test_choices_become_a_spec() -> None:
    config = OptimizeConfig(sae=("a", "b"), max_new_tokens=9)
    low, high = "layers.1.resid_post", "layers.2.resid_post"
    made: dict[str, Any] = {"layer": low, f"{low} latent 1": "17", "value 1": 4.0, "latents": 2, "value 2": 2.5}
    made |= {f"{low} latent 2": "5", "positions": "first", "first": 3, f"{low} gate": "latent", "gate share": 0.3333}
    trial = Fixed(**made)
    spec = choose(trial, config, SPACE)
    assert spec == SteeringSpec(
        (Edit(low, "s", (5,), 2.5), Edit(low, "s", (17,), 4.0)),
        Positions("answer", first=3),
        LatentGate(low, "s", 7, 0.667, positions=Positions("last_prompt_token")),
    )
    assert words(spec) == ("latent 5 at 2.5 + latent 17 at 4 (block 1), first 3 answer tokens, if latent 7 > 0.667")
    assert "half_life" not in trial.asked  # what does not apply is not modelled
    # a probe above the edits would decide too late, so the lower layer is not offered one
    with pytest.raises(AssertionError):
        choose(Fixed(**{**made, f"{low} gate": "probe"}), config, SPACE)
    made = {
        "layer": high,
        "latents": 2,
        f"{high} latent 1": "3",
        f"{high} latent 2": "3",
        "value 1": 6.0,
        "value 2": 1.0,
    }
    made |= {"positions": "half_life", "half_life": 4, f"{high} gate": "probe", "threshold": 0.61234}
    spec = choose(Fixed(**made, strength="probability"), config, SPACE)
    assert spec == SteeringSpec(
        (Edit(high, "t", (3,), 6.0),),
        Positions("answer", half_life=4),
        ProbeGate(high, "abcdef0123", 0.612, strength="probability"),
    )
    assert words(spec).endswith("answer tokens, half-life 4, if probe abcdef01 > 0.612, by probability")


def test_every_kind_of_choice_is_tried(finished: Path) -> None:
    seen = [trial.params for trial in trials(finished)]
    assert {one["gate"] for one in seen} == {"none", "latent", "probe"}
    assert len({one["positions"] for one in seen}) >= 4
    assert {one["latents"] for one in seen} == {1, 2}


def test_what_is_picked_reads_back_and_can_be_evaluated(
    tiny: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = result(finished)
    gated = [one for one in (*found.front, *found.others) if "if probe" in one.label]
    assert gated
    monkeypatch.chdir(tmp_path)
    command = ["optimize", str(finished), "--pick", str(gated[0].number), "--name", "strict"]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    spec = read_spec(Path("strict.json"))
    assert spec.hash == gated[0].spec == said["trial"]["spec"]
    assert isinstance(spec.gate, ProbeGate)
    assert load_probe(Path("strict.probe.safetensors")).hash == spec.gate.probe
    program, *rest = shlex.split(said["command"])
    assert program == "demur"
    small = ["--suite", "harmful:2", "plain:2", "--max-new-tokens", "3", "--no-damage", "--out", "eval"]
    assert main([*rest, *small]) == 0
    assert read_json(Path("eval/evaluation.json"))["sides"][1]["spec"] == spec.hash
    other = next(one for one in (*found.front, *found.others) if one.spec != spec.hash)
    assert main(["optimize", str(finished), "--pick", str(other.number), "--name", "strict"]) == 1
    assert "holds another spec" in capsys.readouterr().err


def test_the_report_is_on_test_prompts_only(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = result(finished).front[0]
    assert main(["optimize", str(finished), "--pick", str(one.number), "--report", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [side["spec"] for side in shown["sides"]] == [UNSTEERED, one.spec]
    folder = Path(shown["report"]).parent
    split = {p.id: p.split for name in ("harmful", "lookalike", "plain") for p in load_prompts(name, "benign")}
    seen = {json.loads(line)["prompt"] for line in (folder / "completions.jsonl").read_text().splitlines()}
    assert {split[prompt] for prompt in seen} == {"test"}


# --- what is shown --------------------------------------------------------------------------------


def test_the_table_and_the_page_say_it_all(finished: Path) -> None:
    found = result(finished)
    assert front_table(found).row_count == 1 + len(found.front)
    page = (finished / "front.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert "http-equiv" in page
    figures = json.loads(page.split('id="figure-data">')[1].split("</script>")[0])
    shown = {text.split("<br>")[0] for trace in figures["lost"]["data"] for text in trace["hovertext"]}
    every = (*found.front, *found.others)
    assert shown == {"unsteered", *(f"trial {one.number}: {one.label}" for one in every)}
    one = found.front[0]
    assert all(f"{heading} " in hover(one) for heading in COLUMNS.values())
    assert f"({one.harmful_refused.k}/{one.harmful_refused.n})" in hover(one)
    assert f"{len(every)} specs judged, {len(found.front)} on the front" in summary(found)
    assert f"{sum(found.pruned.values())} stopped by the screen" in summary(found)
    run = from_json(Run, read_json(finished / "run.json"))
    assert "<script>alert" not in render(replace(found, notes=("<script>alert(1)</script>",)), run)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--suite", "harmful:3"], "no benign prompt in their select split"),
        (["--suite", "harmful:3", "plain:2", "plain:4"], "occurs twice"),
        (["--latents", "5000"], "latent 5000 does not exist"),
        (["--values", "0", "4"], "expected the least and the largest, above 0"),
        (["--objectives", "kl"], "two or more to weigh up"),
        (["--sae", "a", "b"], "whose numbers mean different latents"),
        (["--trials", "0"], "trials is 0"),
        (["--pick", "3", "--name", "x"], "need a run"),
        (["--positions", "sometimes"], "sometimes"),
    ],
)
def test_bad_settings_are_one_sentence(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert code_of(["optimize", *tiny, *more, "--out", str(tmp_path / "run")]) in (1, 2)
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "run" / JOURNAL).exists()


def test_a_run_keeps_its_settings(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, said in (
        ([str(finished), "--seed", "3"], "seed differs"),
        ([str(finished), "--pick", "99", "--name", "x"], "trial 99 of"),
        ([str(finished), "--pick", "0"], "pick needs a trial and a name"),
        ([str(tmp_path)], "is no run folder"),
    ):
        assert code_of(["optimize", *command]) in (1, 2)
        assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_without_optuna_it_says_what_to_install(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(optimize_study, "find_spec", lambda name: None)
    assert main(["optimize", *tiny]) == 1
    assert "pip install 'demur[optimize]'" in capsys.readouterr().err
