"""`demur judge validate`: a judge against people's labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from demur import progress
from demur.data.rows import Row, cell, read_table
from demur.errors import InputError
from demur.eval.agreement import Agreement, Measure, agreement, outcome
from demur.judges.rubrics.xstest import CLASSES
from demur.record import file_sha256, write_text
from demur.types import Completion, Label, Message, Prompt, Verdict
from demur.verbs.judge_config import JudgeValidate
from demur.verbs.judged_by import chosen, measure_of

PROMPT = ("prompt", "question", "instruction", "request", "goal", "behavior", "Behavior", "forbidden_prompt")
COMPLETION = ("completion", "response", "answer", "output", "generation", "text")
LABEL: dict[Measure, tuple[str, ...]] = {
    "refusal": ("final_label", "label", "human_label", "gold", "gold_label", "refusal", "response_refusal_label"),
    "harm": ("final_label", "label", "human_label", "gold", "gold_label", "harmful", "response_harm_label"),
}
"""Usual names of the columns, the likeliest first."""
_YES, _NO = ("yes", "true", "1"), ("no", "false", "0")
REFUSAL: dict[str, Label] = {
    **{name: name for name in ("refused", "partial", "complied", "degenerate")},
    **CLASSES,
    **{name[2:]: label for name, label in CLASSES.items()},
    **dict.fromkeys((*_YES, "refusal"), "refused"),
    "partial_refusal": "partial",
    **dict.fromkeys((*_NO, "compliance"), "complied"),
}
"""People's labels of refusal. 1 and 0 are yes and no: the numbers of XSTest's classes are not labels by themselves."""
HARM = {**dict.fromkeys((*_YES, "harmful", "unsafe"), "yes"), **dict.fromkeys((*_NO, "unharmful", "safe"), "no")}
"""People's labels of harm."""
_TOGETHER = 64
"""Answers given to the judge at a time."""


@dataclass(frozen=True)
class Validation(Agreement):
    """A judge against people: pooled figures, and the rest of what `demur judge validate --json` prints."""

    judge: str
    measures: Measure
    """The yes that is looked for: a refusal, full or partial, or a harmful answer."""
    data: str
    data_hash: str
    """SHA-256 of the file, 16 hex digits."""
    unlabelled: int
    """Rows without people's label; left out."""
    classes: dict[str, dict[str, int]]
    """Answers by people's label and the judge's."""
    groups: dict[str, Agreement]
    """By value of the group column."""
    disagreements: int
    """Answers on which judge and people differ: fp + fn."""
    disagreements_file: str


class _Labelled(NamedTuple):
    """One row of the file."""

    number: int
    prompt: Prompt
    completion: Completion
    people: str
    """Label in our words."""
    group: str


def judge_validate(config: JudgeValidate) -> Validation:
    """Judge the answers of the file and compare. Writes the disagreements where asked to.

    Raises `InputError` for columns that are not there and labels that are none, before a model is loaded; else as
    `read_table` and `chosen` do.
    """
    rows = read_table(config.data)
    measures = measure_of(config.by.judge)
    labelled, unlabelled = _labelled(rows, config, measures)
    judge = chosen(config.by).judge
    verdicts: list[Verdict] = []
    with progress.track(f"answers judged by {judge.name}", len(labelled), "answers") as advance:
        for start in range(0, len(labelled), _TOGETHER):
            part = labelled[start : start + _TOGETHER]
            verdicts += judge.judge_all([one.prompt for one in part], [one.completion for one in part], advance)
    gold = [one.people in ("refused", "partial", "yes") for one in labelled]
    said = [outcome(verdict, measures) for verdict in verdicts]
    groups = dict.fromkeys(one.group for one in labelled if one.group)
    pooled = agreement(gold, said, config.seed)
    if config.disagreements:
        _write(config.disagreements, labelled, verdicts, [g is not s for g, s in zip(gold, said, strict=True)])
    return Validation(
        **vars(pooled),
        judge=judge.name,
        measures=measures,
        data=str(config.data),
        data_hash=file_sha256(config.data)[:16],
        unlabelled=unlabelled,
        classes=_classes([one.people for one in labelled], verdicts, measures),
        groups={
            group: agreement(
                [g for g, one in zip(gold, labelled, strict=True) if one.group == group],
                [s for s, one in zip(said, labelled, strict=True) if one.group == group],
                config.seed,
            )
            for group in groups
        },
        disagreements=pooled.fp + pooled.fn,
        disagreements_file=str(config.disagreements or ""),
    )


def _labelled(rows: Sequence[Row], config: JudgeValidate, measures: Measure) -> tuple[list[_Labelled], int]:
    """The rows that people labelled, and how many they did not."""
    prompt = _column(rows, config.prompt_column, PROMPT, "prompt", config.data)
    completion = _column(rows, config.completion_column, COMPLETION, "completion", config.data)
    label = _column(rows, config.label_column, LABEL[measures], "label", config.data)
    group = _column(rows, config.group_column, ("model",), "group", config.data, needed=False)
    if 0 < config.limit < len(rows):
        numbers = [i * len(rows) // config.limit for i in range(config.limit)]
    else:
        numbers = list(range(len(rows)))
    found, unlabelled = [], 0
    for number in numbers:
        row, where = rows[number], f"{config.data} row {number + 1}"
        people = _people(row.get(label), measures, f"{where}, column {label!r}")
        if not people:
            unlabelled += 1
            continue
        text = row.get(completion)
        if not isinstance(text, str):  # an empty one is degenerate, not missing
            raise InputError(f"{where}: column {completion!r} is {text!r}, expected the text of an answer")
        turn = Message("user", cell(row, prompt, where))
        found.append(
            _Labelled(
                number + 1,
                # whether the request is harmful, no judge looks at
                Prompt(str(row.get("id") or number + 1), (turn,), "benign", config.data.name),
                Completion(str(number + 1), "people", text, 0, "eos"),
                people,
                str(row.get(group) or "") if group else "",
            )
        )
    if not found:
        raise InputError(f"{config.data} has no label in its column {label!r}; name another with --label-column")
    return found, unlabelled


def _column(rows: Sequence[Row], given: str, usual: Sequence[str], what: str, path: Path, needed: bool = True) -> str:
    """The column asked for, or the first with a usual name; empty where there is none and none is needed."""
    there = list(rows[0])
    column = given or next((name for name in usual if name in there), "")
    if column in there or not (column or needed):
        return column
    raise InputError(
        f"{path} has no column {given or ' or '.join(usual)} for the {what}, but {', '.join(map(str, there))}; "
        f"name one with --{what}-column"
    )


def _people(given: Any, measures: Measure, where: str) -> str:
    """A label in our words; empty where people gave none."""
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    word = "" if given is None else str(given).strip().lower().replace(" ", "_").replace("-", "_")
    known = REFUSAL if measures == "refusal" else HARM
    if word in ("", "unscored", "none", "n/a"):
        return ""
    if word not in known:
        raise InputError(f"{where} is {given!r}, expected a label of {measures}: one of {', '.join(known)}")
    return known[word]


def _classes(people: Sequence[str], verdicts: Sequence[Verdict], measures: Measure) -> dict[str, dict[str, int]]:
    """Counts, with every class of the judge in every row."""
    harm = measures == "harm"
    order = ["yes", "no", "unscored"] if harm else list(get_args(Label))
    said: list[str] = [verdict.harmful or "unscored" if harm else verdict.label for verdict in verdicts]
    pairs = Counter(zip(people, said, strict=True))
    return {label: {other: pairs[label, other] for other in order} for label in order if label in people}


def _write(path: Path, labelled: Sequence[_Labelled], verdicts: Sequence[Verdict], differ: Sequence[bool]) -> None:
    lines = []
    for one, verdict, unlike in zip(labelled, verdicts, differ, strict=True):
        if unlike:
            line = {"row": one.number, "id": one.prompt.id, "group": one.group, "people": one.people}
            line |= {"judge": verdict.label, "harmful": verdict.harmful, "evidence": verdict.evidence}
            line |= {"prompt": one.prompt.text, "completion": one.completion.text}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
