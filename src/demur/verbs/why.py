"""`demur why`: where the damage comes from that a spec does to harmless answers. See docs/why.md.

Every step writes what it found into the run folder and is skipped when it is there, so a run that was killed goes on.
Whatever is fitted or chosen is so on the select split; what is reported on are test prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from demur import progress
from demur.errors import InputError
from demur.eval.anatomy import Instruments, Values, measure_harmful, measure_plain
from demur.eval.diagnosis import Series, as_it_is, contrasts, merged, most_switched, side
from demur.eval.interventions import BASE, Intervention, edited_latents
from demur.record import read_json, write_json, write_text
from demur.report.why import render
from demur.results import Diagnosis, WhyProbe
from demur.spec import DirectionEdit, Edit, SteeringSpec
from demur.types import UNSTEERED, Label, Prompt
from demur.verbs.diagnosing import TOGETHER, Diagnosing, Setup, begin, instruments, set_up
from demur.verbs.run_folder import Clock, alone, claim
from demur.verbs.why_config import Why

RESULT, PARTS, PROBES = "why.json", "parts", "probes.json"


def why(config: Why) -> Diagnosis:
    """Run the diagnosis, which is also `why.json` in the run folder, beside `why.html`. Raises as `begin` does, and
    `InputError` for a spec that moves no token of the prompts it is measured on."""
    start = time.monotonic()
    going, run = begin(config)
    folder, what = going.folder, going.config
    clock = Clock(folder, RESULT)
    with alone(folder):
        run = claim(folder, what, run)
        clock.add("load", time.monotonic() - start)
        write_json(folder / "spec.json", going.spec)
        with clock.step("unsteered answers"):
            _unsteered(going)
        with clock.step("controls and directions"):
            setup = set_up(going)
        with clock.step("passes"):
            values, counted, tokens = _passes(going, setup)
        labels: dict[str, dict[str, list[Label]]] = {}
        if what.answers:
            with clock.step("answers"):
                labels = _answers(going, setup)
        series = Series(values, setup.interventions, what.seed)
        result = Diagnosis(
            name=what.name,
            model=run.artefacts["model"],
            spec=going.spec.hash,
            edits=_in_words(going.spec),
            hookpoint=str(going.edited[0]),
            plain=len(series.of("edit", "kl")),
            harmful=len(going.harmful),
            sides=tuple(side(series, one, labels.get(one.key)) for one in setup.interventions if _told(series, one)),
            numbers=tuple(series.numbers()),
            contrasts=tuple(contrasts(series, setup.interventions)),
            probes=tuple(WhyProbe(**row) for row in read_json(folder / PROBES)),
            latents=tuple(most_switched(counted, tokens)),
            unsteered=as_it_is(series, labels.get(UNSTEERED), len(series.of("edit", "kl"))),
            seconds=clock.seconds(),
            notes=tuple(_notes(going, setup, labels)),
            report=str((folder / "why.html").resolve()),
        )
        write_json(folder / RESULT, result)
        write_text(folder / "why.html", render(result, run))
    return result


def _told(series: Series, one: Intervention) -> bool:
    """A side that steers tokens which no prompt has is not told."""
    if one.kind not in ("only", "but"):
        return True
    kind = one.key.split()[1]
    return bool(series.of("edit", "ratio", kind)) or kind == "answer"


def _unsteered(going: Diagnosing) -> None:
    """Answers of the model as it is; also without the system prompt, for what that does."""
    config, prompts = going.config, [*going.plain, *going.harmful]
    every = [*prompts, *going.select]
    runs = [(going.completions, every, config.system)]
    if config.system:
        runs.append((going.bare, prompts if config.answers else going.plain, ""))
    with progress.track("unsteered answers", sum(len(some) for _, some, _ in runs), "prompts") as advance:
        for where, some, system in runs:
            where.complete(
                going.loaded.lm, some, SteeringSpec(), (), system, config.max_new_tokens, config.batch_size, advance
            )
    if not going.texts(going.plain, BASE):
        raise InputError("the unsteered model says nothing to any plain prompt, so there is nothing to damage")


def _passes(going: Diagnosing, setup: Setup) -> tuple[Values, dict[str, tuple[list[int], list[int]]], int]:
    """Everything that is teacher-forced, batch by batch; and latents counted before and after the edit over so many
    tokens."""
    bench = going.bench(setup.interventions, setup.vectors)
    views = {view for one in setup.interventions for view in (one.view, one.base)}
    ready = cache(lambda: instruments(going))
    found: list[Values] = []
    counted: dict[str, tuple[list[int], list[int]]] = {}
    tokens = 0

    def chunks(prompts: Sequence[Prompt]) -> list[Sequence[Prompt]]:
        return [prompts[i : i + TOGETHER] for i in range(0, len(prompts), TOGETHER)]

    total = len(setup.interventions) * (len(going.plain) + (len(going.harmful) if going.openings else 0))
    with progress.track("passes", total, "prompts") as advance:
        for number, prompts in enumerate(chunks(going.plain)):

            def plain(some: Sequence[Prompt] = prompts) -> dict[str, Any]:
                texts = {view: going.texts(some, view) for view in views}
                tools = Instruments(ready().usual, ready().probes, ready().lenses)
                values = measure_plain(bench, texts, setup.interventions, tools, advance)
                counts = {name: [one.tolist() for one in pair] for name, pair in tools.counted.items()}
                seen = sum(len(text.ids) - text.body for text in texts[BASE])
                return {"values": values, "counted": counts, "tokens": seen}

            kept = _part(going, f"plain-{number}", plain)
            found.append(kept["values"])
            tokens += kept["tokens"]
            for name, (before, after) in kept["counted"].items():
                old = counted.get(name, ([0] * len(before), [0] * len(after)))
                counted[name] = (_sum(old[0], before), _sum(old[1], after))
        if not (going.folder / PROBES).exists():
            rows = [
                {
                    "what": what,
                    "hookpoint": place,
                    "auroc": one.auroc,
                    "positives": one.positives,
                    "negatives": one.negatives,
                }
                for (what, place), one in ready().probes.items()
            ]
            write_json(going.folder / PROBES, rows)
        openings = going.openings
        for number, prompts in enumerate(chunks(going.harmful) if openings else ()):

            def harmful(some: Sequence[Prompt] = prompts) -> dict[str, Any]:
                assert openings is not None
                texts = {view: going.texts(some, view, answered=False) for view in views}
                return {"values": measure_harmful(bench, texts, setup.interventions, openings, advance)}

            found.append(_part(going, f"harmful-{number}", harmful)["values"])
    return merged(found), counted, tokens


def _sum(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(one, other, strict=True)]


def _part(going: Diagnosing, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a batch gave: measured once and kept."""
    path = going.folder / PARTS / f"{name}.json"
    if not path.exists():
        write_json(path, measure())
    kept: dict[str, Any] = read_json(path)
    return kept


def _answers(going: Diagnosing, setup: Setup) -> dict[str, dict[str, list[Label]]]:
    """Labels of the answers of some sides, by side and set."""
    config = going.config
    some = [(one.key, one.asked) for one in setup.interventions if one.asked is not None]
    prompts = [*going.plain, *going.harmful]
    saes, vectors = going.loaded.saes, [*going.loaded.directions, *setup.vectors]
    with progress.track("answers", len(some) * len(prompts), "prompts") as advance:
        for _, spec in some:
            going.completions.complete(
                going.loaded.lm,
                prompts,
                spec,
                saes,
                config.system,
                config.max_new_tokens,
                config.batch_size,
                advance,
                vectors,
            )
    found = {key: _labels(going, spec.hash) for key, spec in some}
    found[UNSTEERED] = _labels(going, UNSTEERED)
    return found if not config.system else {**found, "prompt": found[UNSTEERED]}


def _labels(going: Diagnosing, spec: str) -> dict[str, list[Label]]:
    sets = {"plain": going.plain, "harmful": going.harmful}
    return {name: [going.label(prompt, spec) for prompt in prompts] for name, prompts in sets.items()}


def _in_words(spec: SteeringSpec) -> str:
    """`latent 957 clamped to 8 at layers.16.resid_post`."""
    done = {"clamp": "clamped to", "floor": "kept above", "ceil": "kept below", "add": "raised by", "scale": "times"}
    said = []
    for edit in spec.edits:
        if isinstance(edit, DirectionEdit):
            how = f"added {edit.value:g} times" if edit.op == "add" else "projected out"
            said.append(f"direction {edit.direction} {how} at {edit.hookpoint}")
            continue
        assert isinstance(edit, Edit)
        many = "latents" if len(edit.latents) > 1 else "latent"
        how = "switched off" if edit.op == "ablate" else f"{done[edit.op]} {edit.value:g}"
        unit = f" {edit.unit}" if edit.unit != "latent" else ""
        said.append(f"{many} {', '.join(map(str, edit.latents))} {how}{unit} at {edit.hookpoint}")
    where = "" if spec.positions.where == "all" else f", on {spec.positions.where} tokens"
    return " and ".join(said) + where + (", behind a gate" if spec.gate else "")


def _notes(going: Diagnosing, setup: Setup, labels: Mapping[str, Mapping[str, Sequence[Label]]]) -> list[str]:
    notes = list(going.notes)
    if going.openings is None:
        notes.append(
            "The unsteered model refuses no select prompt in words that tell refusing from answering, so the log-odds "
            "of refusing were not measured."
        )
    if not any(one.kind == "control" for one in setup.interventions):
        notes.append("No control latent could stand for the spec's edits, so none was measured.")
    if not any(one.kind == "reconstruction" for one in setup.interventions):
        notes.append(
            "The spec edits through no SAE, or through two at one hookpoint, so reconstruction has no share in it."
        )
    if len(edited_latents(going.spec)) > 1 and going.config.control:
        notes.append("Control latents stand for the spec's in the order in which they were given.")
    if not going.config.system:
        return notes
    if labels:
        bare = [going.label(prompt, UNSTEERED, going.bare) for prompt in going.harmful]
        notes.append(
            f"The safety system prompt is in force on every other side, too. Without it the model refuses "
            f"{bare.count('refused')} of {len(bare)} harmful prompts; its damage is measured from there."
        )
    return notes
