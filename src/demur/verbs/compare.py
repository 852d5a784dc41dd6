"""`demur compare`: runs of `demur eval`, prompt by prompt and document by document. The model is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from demur.errors import InputError
from demur.eval.compare import comparisons, damage, groups, harms, refusals, tasks
from demur.eval.judge_error import rogan_gladen
from demur.eval.rows import ANY, refused_rate
from demur.eval.saved import Saved, read_run
from demur.eval.statistics import rate
from demur.record import read_json, write_text
from demur.report.comparison import Talk, render
from demur.results import Comparison, Contrast, Side
from demur.types import Prompt, TaskSample
from demur.verbs.eval_config import Compare, named_limit
from demur.verbs.judged_by import measure_of


class Compared(NamedTuple):
    """What `demur compare` prints."""

    comparisons: list[Comparison]
    notes: list[str]
    report: str
    """Path of the page."""


class _Of(NamedTuple):
    run: Saved
    side: Side


def compare(config: Compare) -> Compared:
    """Set every side against the first, and write the page.

    Raises as `read_run` does, and `InputError` where there is nothing to compare: one side only, no prompt in common,
    no verdicts of the judge, or one prompt id with two texts.
    """
    sides = [side for given in config.runs for side in _sides(given)]
    if len(sides) < 2:
        raise InputError(
            f"{' '.join(config.runs)} has one side only; give a second run, or a run that has a steered side"
        )
    base, others = sides[0], sides[1:]
    judge = _judge(config.judge, base.run)
    labelled = len({one.side.label for one in sides}) == len(sides)
    found: list[tuple[Side, list[Contrast]]] = []
    notes: list[str] = []
    for other in others:
        common = _common(base, other)
        contrasts = _judged(common, base, other, judge, config.seed)
        more, said = tasks(_samples(base), _samples(other), config.margin, config.seed)
        contrasts += more
        notes += [*said, *_differs(base.run, other.run)]
        if base.run.run.artefacts.get("model") == other.run.run.artefacts.get("model"):
            contrasts += damage(
                base.run.measured(base.side.spec), other.run.measured(other.side.spec), seed=config.seed
            )
        if not contrasts:
            raise InputError(
                f"{other.run.folder} and {base.run.folder} have no prompt with verdicts of {judge or 'any judge'} and "
                "no task in common; evaluate both on the same suites"
            )
        if alone := len({p.id for p in base.run.prompts} ^ {p.id for p in other.run.prompts}):
            notes.append(f"{alone} prompts are in one of {base.run.folder} and {other.run.folder} only, and left out.")
        if config.correct:
            notes += _corrected(config.correct, common, base, other, judge, config.seed)
        found.append((other.side if labelled else _named(other), contrasts))
    made = comparisons(base.side if labelled else _named(base), found, config.margin, judge)
    notes += [line for one in sides for line in limit_lines(one.run.run.config)]
    page = config.out or sides[-1].run.folder / "compare.html"
    talks = [Talk(one.side, one.run.prompts, one.run.completions, one.run.verdicts) for one in sides]
    notes = list(dict.fromkeys(notes))
    write_text(page, render(made, talks, base.run.run, notes, judge))
    return Compared(made, notes, str(page.resolve()))


def limit_lines(config: Mapping[str, Any]) -> list[str]:
    """What a run took of its suites and tasks, where that was not all."""
    given = [named_limit(one) for one in (*config.get("suite", ()), *config.get("task", ()))]
    each = {"mmlu": " of each subject", "truthfulqa": " of each of its tasks"}
    return [f"{name}: only {limit} items{each.get(name, '')} were taken." for name, limit in given if limit]


def _judge(wanted: str, run: Saved) -> str:
    """The judge of that name, or the only one whose name begins so; by default the first."""
    judges = run.judges()
    fitting = [name for name in judges if name == wanted] or [name for name in judges if name.startswith(wanted)]
    if (wanted and len(fitting) != 1) or (judges and not fitting):
        raise InputError(f"{run.folder} has no verdicts of judge {wanted!r}; it has {', '.join(judges) or 'none'}")
    return fitting[0] if fitting else ""


def _judged(prompts: list[Prompt], base: _Of, other: _Of, judge: str, seed: int) -> list[Contrast]:
    """What the judge says about refusals, or about harm if that is what it judges."""
    if not prompts:
        return []
    before, after = (one.run.said(one.side.spec, judge) for one in (base, other))
    for one, said in ((base, before), (other, after)):
        if not said:
            raise InputError(
                f"{one.run.folder} has no verdicts of {judge or 'any judge'} on {one.side.label}; judge it with "
                f"`demur judge {one.run.folder}`, or choose another --judge"
            )
    return (harms if measure_of(judge) == "harm" else refusals)(prompts, before, after, seed)


def _named(one: _Of) -> Side:
    """The side, told from one of the same label in another run."""
    return replace(one.side, label=f"{one.run.run.name}: {one.side.label}")


def _sides(given: str) -> list[_Of]:
    """All sides of FOLDER, or the one of FOLDER@LABEL."""
    folder, at, label = given.partition("@") if not Path(given).is_dir() else (given, "", "")
    run = read_run(Path(folder))
    if not at:
        return [_Of(run, side) for side in run.sides]
    found = [_Of(run, side) for side in run.sides if label in (side.label, side.spec)]
    if not found:
        raise InputError(f"{folder} has no side {label!r}; it has {', '.join(side.label for side in run.sides)}")
    return found


def _common(base: _Of, other: _Of) -> list[Prompt]:
    theirs = {prompt.id: prompt for prompt in other.run.prompts}
    both = [prompt for prompt in base.run.prompts if prompt.id in theirs]
    for prompt in both:
        if theirs[prompt.id].messages != prompt.messages:
            raise InputError(
                f"prompt {prompt.id} has one text in {base.run.folder} and another in {other.run.folder}; "
                "evaluate both on the same suites"
            )
    return both


def _samples(one: _Of) -> list[TaskSample]:
    return [sample for sample in one.run.samples if sample.spec == one.side.spec]


def _corrected(file: Path, prompts: list[Prompt], base: _Of, other: _Of, judge: str, seed: int) -> list[str]:
    """Rates of both sides corrected by Rogan and Gladen for the errors that `file` found in the judge, as sentences."""
    found = read_json(file)
    keys = ("judge", "measures", "tp", "fp", "fn", "tn")
    if not isinstance(found, dict) or any(key not in found for key in keys):
        raise InputError(f"{file} is not what demur judge validate --json prints; give that")
    if found["judge"] != judge or found["measures"] != "refusal":
        raise InputError(
            f"{file} is about the {found['measures']} judge {found['judge']}, but refusals by {judge} are compared"
        )
    sensitivity = rate(found["tp"], found["tp"] + found["fn"])
    specificity = rate(found["tn"], found["tn"] + found["fp"])
    notes = []
    for (suite, intent), some in groups(prompts).items():
        said = []
        for one in (base, other):
            verdicts = one.run.said(one.side.spec, judge)
            seen = refused_rate([verdicts[p.id].label for p in some if p.id in verdicts], ANY)
            true = rogan_gladen(seen, sensitivity, specificity, seed)
            said.append(f"{100 * true.value:.1f} % [{100 * true.low:.1f}, {100 * true.high:.1f}]")
        notes.append(
            f"{suite}, {intent} refused fully or partly, corrected for the judge's errors: {said[0]} for "
            f"{base.side.label}, {said[1]} for {other.side.label}."
        )
    return notes


def _differs(base: Saved, other: Saved) -> list[str]:
    """What else than the spec differs, and so may be behind a difference."""
    notes = []
    if base.run.artefacts.get("model") != other.run.artefacts.get("model"):
        notes.append(f"The models differ: {base.run.artefacts.get('model')} and {other.run.artefacts.get('model')}.")
    for key in ("system", "max_new_tokens", "dtype", "batch_size"):
        mine, theirs = base.run.config.get(key), other.run.config.get(key)
        if mine != theirs:
            notes.append(f"{key} differs: {mine!r} in {base.folder}, {theirs!r} in {other.folder}.")
    for saved in (base, other):
        have = {(one.spec, one.prompt) for one in saved.completions}
        missing = sum((side.spec, prompt.id) not in have for side in saved.sides for prompt in saved.prompts)
        if missing:
            notes.append(f"{saved.folder} is not finished: {missing} answers are missing, and count as unscored.")
    return notes
