"""A finished or unfinished run of `demur eval`, as its folder has it; the model is not needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from demur.errors import InputError, NotFoundError
from demur.record import from_json, read_json, read_jsonl
from demur.results import Side
from demur.types import Completion, Measurement, Prompt, Run, TaskSample, Verdict, stable_hash

RUN, PROMPTS, SIDES, RESULT = "run.json", "prompts.jsonl", "sides.json", "evaluation.json"
COMPLETIONS, VERDICTS, SAMPLES = "completions.jsonl", "verdicts.jsonl", "samples"
MEASUREMENTS = "measurements.jsonl"


class Saved(NamedTuple):
    """What a run folder holds."""

    folder: Path
    run: Run
    sides: list[Side]
    """The unsteered model first."""
    prompts: list[Prompt]
    completions: list[Completion]
    verdicts: list[Verdict]
    samples: list[TaskSample]
    measurements: list[Measurement]

    def judges(self) -> list[str]:
        """Who judged, in order of appearance."""
        return list(dict.fromkeys(verdict.judge for verdict in self.verdicts))

    def said(self, spec: str, judge: str) -> dict[str, Verdict]:
        """By prompt id, the verdicts of `judge` on the answers under the spec."""
        return {v.prompt: v for v in self.verdicts if v.spec == spec and v.judge == judge}

    def measured(self, spec: str) -> dict[str, dict[str, float]]:
        """By name and item, what was measured under the spec."""
        found: dict[str, dict[str, float]] = {}
        for one in self.measurements:
            if one.spec == spec:
                found.setdefault(one.name, {})[one.item] = one.value
        return found


def text_hashes(completions: Iterable[Completion]) -> dict[str, str]:
    """By SPEC/PROMPT a hash of each answer's text, which tells whether it is the same without keeping it."""
    return {f"{one.spec}/{one.prompt}": stable_hash(one.text) for one in completions}


def read_run(folder: Path, mend: bool = False) -> Saved:
    """What `folder` holds; `mend` as for `read_jsonl`.

    Raises `NotFoundError` for a folder that is none, `InputError` for a run of another verb.
    """
    path = folder / RUN
    if not path.is_file():
        raise NotFoundError(f"{folder} is no run folder (it has no {RUN}); give a folder that demur eval wrote")
    run = from_json(Run, read_json(path), str(path))
    if run.kind != "eval":
        raise InputError(f"{folder} holds a run of demur {run.kind}, expected one of demur eval")
    sides = [from_json(Side, one, str(folder / SIDES)) for one in read_json(folder / SIDES)]
    return Saved(
        folder,
        run,
        [replace(side, run=str(folder)) for side in sides],
        read_jsonl(Prompt, folder / PROMPTS, mend),
        read_jsonl(Completion, folder / COMPLETIONS, mend),
        read_jsonl(Verdict, folder / VERDICTS, mend),
        [row for path in sorted((folder / SAMPLES).glob("*.jsonl")) for row in read_jsonl(TaskSample, path, mend)],
        read_jsonl(Measurement, folder / MEASUREMENTS, mend),
    )
