"""`demur reproduce`: an evaluation again, from the `reproduce.json` that it left, and what differs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from demur import progress
from demur.errors import InputError, RunExistsError
from demur.eval.saved import RESULT, read_run, text_hashes
from demur.record import from_json, provenance, read_json
from demur.spec import SteeringSpec
from demur.types import Run
from demur.verbs.eval_config import Eval, EvalConfig, Reproduce
from demur.verbs.evaluate import evaluate
from demur.verbs.evaluating import run_folder
from demur.verbs.sides import Named

FORMAT = "demur-reproduce/1"
Severity = Literal["numbers", "rounding", "nothing"]


class Difference(NamedTuple):
    """Something that is not as it was."""

    severity: Severity
    """`numbers`: results may differ. `rounding`: near-ties may turn. `nothing`: no result depends on it."""
    what: str
    then: str
    now: str


@dataclass(frozen=True)
class Reproduced:
    """What `demur reproduce` prints."""

    differences: tuple[Difference, ...]
    answers: int
    """Answers that both runs have."""
    same_answers: int
    """Of these, those whose text is the same to the letter."""
    same_labels: int
    """Of these, those that were judged alike."""
    flips: tuple[str, ...]
    """SPEC/PROMPT of answers that were judged otherwise."""
    scores: int
    """Task scores that were recorded."""
    same_scores: int
    """Of these, those that came out equal."""
    folder: str


def reproduce(config: Reproduce) -> Reproduced:
    """Run the evaluation of `config.file` again and hold the results against those that it recorded.

    Raises `InputError` for another file, and as `evaluate` does.
    """
    stored = read_json(config.file)
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise InputError(f"{config.file} is no {FORMAT} file; give the reproduce.json of a demur eval run")
    where = str(config.file)
    then = from_json(Run, stored["run"], where)
    what = from_json(EvalConfig, then.config, where)
    specs = [Named(str(one["label"]), from_json(SteeringSpec, one["spec"], where)) for one in stored["specs"]]
    folder = config.out or Path(f"{run_folder(what)}-again")
    if (folder / RESULT).exists():
        raise RunExistsError(
            f"{folder} holds a finished run, made with what was here then; choose another --out folder"
        )
    for one in _before(then):
        progress.say(f"  differs ({one.severity}): {one.what}: {one.then} then, {one.now} now")
    result = evaluate(Eval(out=folder, config=what), specs)
    now = read_run(folder)
    answers = text_hashes(now.completions)
    labels = {f"{one.spec}/{one.prompt}": one.label for one in now.verdicts if one.judge == result.judge}
    scores = {(one.task, one.metric, one.spec): one.score.value for one in result.tasks}
    old = {(one["task"], one["metric"], one["spec"]): one["score"]["value"] for one in stored["tasks"]}
    both = [key for key in stored["answers"] if key in answers]
    flips = tuple(key for key in both if stored["labels"].get(key) != labels.get(key))
    return Reproduced(
        (*_before(then), *_after(then, now.run)),
        len(both),
        sum(stored["answers"][key] == answers[key] for key in both),
        len(both) - len(flips),
        flips,
        len(old),
        sum(scores.get(key) == value for key, value in old.items()),
        str(folder.resolve()),
    )


def _before(then: Run) -> list[Difference]:
    """What can be told before anything is loaded."""
    now: dict[str, Any] = provenance()
    found = []
    if then.commit != now["commit"]:
        found.append(Difference("numbers", "commit of demur", then.commit or "none", now["commit"] or "none"))
    if then.dirty or now["dirty"]:
        found.append(Difference("numbers", "uncommitted changes", str(then.dirty), str(now["dirty"])))
    for name, version in then.versions.items():
        if now["versions"].get(name) != version:
            severity: Severity = "nothing" if name == "python" else "rounding"
            found.append(Difference(severity, name, version, now["versions"].get(name, "none")))
    for name, value in then.hardware.items():
        if now["hardware"].get(name) != value:
            found.append(Difference("rounding", name, value, now["hardware"].get(name, "none")))
    return found


def _after(then: Run, now: Run) -> list[Difference]:
    """What only the new run knows: hashes of model, specs and prompts."""
    return [
        Difference("numbers", name, value, now.artefacts.get(name, "none"))
        for name, value in then.artefacts.items()
        if now.artefacts.get(name) != value
    ]
