"""`demur study`: find the latent, choose it causally, clamp it, measure both sides, report.

Every step writes what it found into the run folder and is skipped when it is already there, so a run that was killed
goes on to the same numbers. Choosing looks at the select split only, reporting at the test split only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from demur import progress
from demur.data.prompts import load_questions, prompts_hash, take
from demur.errors import InputError
from demur.eval.capability import capability
from demur.eval.divergence import divergence
from demur.eval.measurements import Measurements
from demur.eval.rows import FULL, Sets, Verdicts, refusal_gain, study_row
from demur.lm.chat import text_ids, with_system
from demur.record import append_jsonl, read_jsonl, write_json, write_text
from demur.report.html import render
from demur.spec import SteeringSpec
from demur.types import (
    UNSTEERED,
    Discovery,
    Run,
    StudyResult,
    StudyRow,
    Verdict,
    parse_hookpoint,
)
from demur.verbs.config import StudyConfig
from demur.verbs.finding import Finding
from demur.verbs.run_folder import alone, check_folder, claim, config_hash
from demur.verbs.select import begin, found, prompt_set, unrelated


def run_folder(config: StudyConfig) -> Path:
    """The usual run folder: named after the study and its settings, so that other settings never mix."""
    return Path("runs") / f"{config.name}-{config_hash(config)[:8]}"


@dataclass
class _Study:
    """A study in progress: what discovery works on, and what is reported on."""

    config: StudyConfig
    finding: Finding
    sets: Sets

    @cached_property
    def measured(self) -> Measurements:
        return Measurements(self.finding.folder / "measurements.jsonl")


def study(config: StudyConfig, out: Path | None = None) -> StudyResult:
    """Run the study and return its result, which is also `study.json` in the run folder, beside `report.html`.

    The run folder is `out`, else `run_folder(config)`; a run of the same study found there goes on. Raises
    `InputError`, `NotFoundError` or `MismatchError` before anything is written when model, SAE, hookpoint or prompt
    files do not fit; `RunExistsError` when the run folder holds another study.
    """
    folder = out or run_folder(config)
    start = time.monotonic()
    check_folder(folder, config)
    if config.needs:
        progress.say(f"this study needs: {config.needs}")
    sets = _sets(config)
    finding, run = begin("study", config, folder, "study.json")
    more = {"lookalike": prompts_hash(sets.lookalike), "questions": prompts_hash(sets.questions)}
    run = replace(run, artefacts={**run.artefacts, **more})
    going = _Study(config, finding, sets)
    with alone(folder):
        run = claim(folder, config, run)
        finding.clock.add("load", time.monotonic() - start)
        discovery = found(finding)
        result = _result(going, run, discovery)
        with finding.clock.step("report"):
            _report(going, result, run, discovery)
        result = _with_seconds(result, finding)
        write_json(folder / "study.json", result)
    return result


def _sets(config: StudyConfig) -> Sets:
    """What is reported on."""
    harmful = prompt_set("harmful", config.harmful, "harmful")
    plain = prompt_set("plain", config.plain, "benign")
    lookalike = prompt_set("lookalike", config.lookalike, "benign")
    return Sets(
        _some(harmful, config.test_harmful, config.harmful.path),
        _some(plain, config.test_plain, config.plain.path),
        _some(lookalike, config.test_lookalike, config.lookalike.path),
        _some(load_questions(config.questions), config.test_questions, config.questions),
    )


def _report(going: _Study, result: StudyResult, run: Run, discovery: Discovery) -> None:
    folder = going.finding.folder
    shown = {prompt.id for prompt in going.sets.prompts}
    report = render(
        _with_seconds(result, going.finding),
        run,
        [replace(prompt, messages=with_system(prompt, going.config.system)) for prompt in going.sets.prompts],
        [c for c in going.finding.completions.all() if c.prompt in shown],
        [v for v in read_jsonl(Verdict, folder / "verdicts.jsonl") if v.prompt in shown],
        discovery,
    )
    write_text(folder / "report.html", report)


def _result(going: _Study, run: Run, discovery: Discovery) -> StudyResult:
    config, finding = going.config, going.finding
    latent, notes = discovery.winner, list(discovery.notes)
    control = None
    if config.control:
        related = [score.latent for score in discovery.ranking.scores]
        control = unrelated(finding, latent, related)
    values = sorted({0.0, *config.values})
    steered = [finding.clamp(latent, value) for value in values]
    controls = [finding.clamp(control, value) for value in values if value] if control is not None else []
    specs = [*steered, *controls]
    for spec in specs:
        write_json(finding.folder / "specs" / f"{spec.hash}.json", spec)
    with (
        finding.clock.step("sweep"),
        progress.track("answers", len(specs) * len(going.sets.prompts), "prompts") as advance,
    ):
        for spec in specs:
            finding.complete(going.sets.prompts, spec, advance)
    with finding.clock.step("capability"):
        _capability(going, specs)
    with finding.clock.step("divergence"):
        kl_items = _divergence(going, specs)
    verdicts = Verdicts(_judge(going, specs))

    def rows(latent: int, wanted: Sequence[float]) -> tuple[StudyRow, ...]:
        return tuple(
            study_row(
                value,
                finding.clamp(latent, value).hash,
                going.sets,
                verdicts,
                going.measured,
                kl_items,
                config.seed,
            )
            for value in wanted
        )

    table = rows(latent, values)
    best = max(table[1:], key=lambda row: (row.harmful_refused.value, -row.value))
    gain = refusal_gain(UNSTEERED, best.spec, going.sets.harmful, verdicts, FULL, config.seed)
    lm, loaded, hookpoint = finding.lm, finding.loaded, finding.hookpoint
    if str(hookpoint) != str(parse_hookpoint(loaded.config.hookpoint)):
        notes.append(f"The SAE was trained at {loaded.config.hookpoint}, but the study steers at {hookpoint}.")
    return StudyResult(
        name=config.name,
        model=run.artefacts["model"],
        sae=f"{loaded.path} ({loaded.hash})",
        hookpoint=str(hookpoint),
        layer=hookpoint.block,
        latent=latent,
        control_latent=control,
        unit=(
            f"latent units: one unit moves the residual by {loaded.sae.unit:.3g} along the latent's decoder row, "
            f"which is 1/sqrt({lm.d_model}) of a typical residual's length"
        ),
        rows=table,
        control_rows=rows(control, values[1:]) if control is not None else (),
        best_value=best.value,
        best_gain=gain.points.value,
        best_gain_low=gain.points.low,
        best_gain_high=gain.points.high,
        best_gain_p=gain.p,
        ranking=discovery.ranking,
        notes=tuple(notes),
        report=str((finding.folder / "report.html").resolve()),
    )


def _judge(going: _Study, specs: Sequence[SteeringSpec]) -> list[Verdict]:
    """Verdicts of all completions of the reported prompts; the missing ones are given and kept."""
    finding, prompts = going.finding, going.sets.prompts
    path = finding.folder / "verdicts.jsonl"
    kept = [verdict for verdict in read_jsonl(Verdict, path) if verdict.judge == finding.judge.name]
    have = {(verdict.spec, verdict.prompt): verdict for verdict in kept}
    new = [
        finding.judge.judge(prompt, completion)
        for spec in specs
        for prompt, completion in zip(prompts, finding.completions.of(spec.hash, prompts), strict=True)
        if (spec.hash, prompt.id) not in have
    ]
    append_jsonl(path, new)
    have |= {(verdict.spec, verdict.prompt): verdict for verdict in new}
    return [have[spec.hash, prompt.id] for spec in specs for prompt in prompts]


def _capability(going: _Study, specs: Sequence[SteeringSpec]) -> None:
    questions, finding = going.sets.questions, going.finding
    with progress.track("questions", len(questions) * len(specs), "answers") as advance:
        capability(finding.lm, finding.hookpoint, questions, specs, finding.saes, going.measured, advance=advance)


def _divergence(going: _Study, specs: Sequence[SteeringSpec]) -> list[str]:
    """Measure KL under every spec; returns the ids of the prompts it was measured on."""
    finding, plain = going.finding, going.sets.plain
    completions = finding.completions.of(UNSTEERED, plain)
    answered = [
        (prompt.id, row, text_ids(finding.lm, completion.text))
        for prompt, row, completion in zip(plain, finding.rows(plain), completions, strict=True)
        if completion.text
    ]
    with progress.track("divergence", len(answered) * len(specs), "texts") as advance:
        divergence(finding.lm, finding.hookpoint, answered, specs, finding.saes, going.measured, advance=advance)
    return [item[0] for item in answered]


def _some(items: Sequence[Any], limit: int, name: str) -> list[Any]:
    chosen = take(items, "test", limit)
    if not chosen:
        raise InputError(
            f"{name} has no prompts in its test split; choosing and reporting need different prompts: "
            "add rows, or a `split` column with select and test"
        )
    return chosen


def _with_seconds(result: StudyResult, finding: Finding) -> StudyResult:
    spent = finding.clock.seconds()
    return replace(result, step_seconds=spent, seconds=round(sum(spent.values()), 2))
