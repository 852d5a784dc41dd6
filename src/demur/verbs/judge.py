"""`demur judge RUN`: judge the saved answers of a run again, without the model that gave them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from demur import progress
from demur.errors import InputError, NotFoundError
from demur.eval.agreement import Agreement, Measure, agreement, outcome
from demur.eval.saved import RUN, VERDICTS, Saved, read_run
from demur.record import append_jsonl
from demur.types import Intent, Label, Message, Prompt, Verdict
from demur.verbs.judge_config import JudgeRun
from demur.verbs.judged_by import Chosen, chosen, measure_of
from demur.verbs.run_folder import alone

_TOGETHER = 64
"""Answers judged before their verdicts are written."""


@dataclass(frozen=True)
class SuiteVerdicts:
    """What the judge made of the answers to one suite under one spec."""

    suite: str
    intent: Intent
    wrapper: str
    side: str
    """What the spec is, in words."""
    spec: str
    labels: dict[Label, int]
    """Answers by label."""
    harmful: int
    """Answers that the judge calls harmful ..."""
    harmless: int
    """... and harmless; of the rest it does not say."""


@dataclass(frozen=True)
class Judged:
    """A run with its answers judged; the object that `demur judge RUN --json` prints."""

    run: str
    judge: str
    measures: Measure
    judged: int
    """Answers judged now; the others were before."""
    suites: tuple[SuiteVerdicts, ...]
    agreement: dict[str, Agreement]
    """With each judge whose verdicts were there, as if it were right: on refusal, or on harm for a judge of harm."""


def judge_run(config: JudgeRun) -> Judged:
    """Add the judge's verdicts to the run, batch by batch, and count them.

    The same answers always form the same batches, and one that is not whole is judged again, so that a run that was
    killed ends with the same verdicts. Raises `NotFoundError` for a folder that is no run, `InputError` for a run
    without answers, else as `read_run`, `alone` and `chosen` do.
    """
    if not (config.folder / RUN).is_file():  # a lock would make the folder
        raise NotFoundError(f"{config.folder} is no run folder (it has no {RUN}); give a folder that demur eval wrote")
    with alone(config.folder):
        saved = read_run(config.folder, mend=True)
        if not saved.completions:
            raise InputError(f"{config.folder} has no answers yet; finish its `demur eval` first")
        who = chosen(config.by)
        mine = {(v.spec, v.prompt): v for v in saved.verdicts if v.judge == who.judge.name}
        before = len(mine)
        _judge(saved, who, mine)
    return Judged(
        run=str(config.folder),
        judge=who.judge.name,
        measures=who.measures,
        judged=len(mine) - before,
        suites=_suites(saved, list(mine.values())),
        agreement=_agreement(saved.verdicts, mine, who, config.seed),
    )


def _judge(saved: Saved, who: Chosen, mine: dict[tuple[str, str], Verdict]) -> None:
    """Judge what is not in `mine`, and put it there and on disk."""
    prompts = {prompt.id: prompt for prompt in saved.prompts}
    # answers that damage is measured on belong to no suite
    rows = [row for row in {(row.spec, row.prompt): row for row in saved.completions}.values() if row.prompt in prompts]
    asked = [_request(prompts[row.prompt], who) for row in rows]
    with progress.track(f"answers judged by {who.judge.name}", len(rows), "answers") as advance:
        for start in range(0, len(rows), _TOGETHER):
            part = rows[start : start + _TOGETHER]
            if all((row.spec, row.prompt) in mine for row in part):
                advance(len(part))
                continue
            verdicts = who.judge.judge_all(asked[start : start + _TOGETHER], part, advance)
            made = {(v.spec, v.prompt): v for v in verdicts if (v.spec, v.prompt) not in mine}
            append_jsonl(saved.folder / VERDICTS, made.values())
            mine |= made


def _request(prompt: Prompt, who: Chosen) -> Prompt:
    """What the judge is shown as the prompt: for some the request before a jailbreak was put around it."""
    if not (who.unwrapped and prompt.unwrapped):
        return prompt
    return replace(prompt, messages=(*prompt.messages[:-1], Message("user", prompt.unwrapped)))


def _suites(saved: Saved, verdicts: Sequence[Verdict]) -> tuple[SuiteVerdicts, ...]:
    prompts = {prompt.id: prompt for prompt in saved.prompts}
    sides = {side.spec: side.label for side in saved.sides}
    grouped: dict[tuple[str, Intent, str, str], list[Verdict]] = {}
    for verdict in verdicts:
        prompt = prompts[verdict.prompt]
        grouped.setdefault((prompt.source, prompt.intent, prompt.wrapper, verdict.spec), []).append(verdict)
    found = []
    for (suite, intent, wrapper, spec), some in grouped.items():
        counts = Counter(verdict.label for verdict in some)
        labels: dict[Label, int] = {label: counts[label] for label in get_args(Label)}
        said = Counter(verdict.harmful for verdict in some)
        found.append(
            SuiteVerdicts(suite, intent, wrapper, sides.get(spec, spec), spec, labels, said["yes"], said["no"])
        )
    return tuple(found)


def _agreement(
    verdicts: Sequence[Verdict], mine: dict[tuple[str, str], Verdict], who: Chosen, seed: int
) -> dict[str, Agreement]:
    """With every other judge that answers the same question, over the answers both were given."""
    found = {}
    for judge in dict.fromkeys(v.judge for v in verdicts if v.judge != who.judge.name):
        if who.measures == "refusal" and measure_of(judge) == "harm":
            continue
        theirs = {(v.spec, v.prompt): outcome(v, who.measures) for v in verdicts if v.judge == judge}
        both = [
            (said, outcome(mine[key], who.measures)) for key, said in theirs.items() if key in mine and said is not None
        ]
        if both:
            found[judge] = agreement([gold for gold, _ in both], [said for _, said in both], seed)
    return found
