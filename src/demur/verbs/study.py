"""`demur study`: find the latent, choose it causally, clamp it, measure both sides, report.

Every step writes what it found into the run folder and is skipped when it is already there, so a run that was killed
goes on to the same numbers. Choosing looks at the select split only, reporting at the test split only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demur import progress
from demur.data.prompts import load_prompts, load_questions, prompts_hash, take
from demur.errors import InputError, RunExistsError
from demur.eval.capability import capability
from demur.eval.complete import Completions
from demur.eval.divergence import divergence
from demur.eval.measurements import Measurements
from demur.eval.rows import ANY, FULL, Sets, Verdicts, refusal_gain, study_row
from demur.features.archetype import candidates
from demur.features.choose import Tried, rank_finalists
from demur.features.control import control_latent, firing_rates
from demur.features.screen import Screen, screen_all
from demur.judges.rules import RulesJudge
from demur.lm.chat import chat_ids, text_ids, with_system
from demur.lm.hookpoints import block_at, parse_hookpoint
from demur.lm.load import LanguageModel, load
from demur.record import (
    append_jsonl,
    from_json,
    provenance,
    read_json,
    read_jsonl,
    to_json,
    write_json,
    write_text,
)
from demur.report.html import render
from demur.sae.store import LoadedSae, check_fits, load_sae
from demur.types import (
    UNSTEERED,
    Completion,
    Edit,
    Hookpoint,
    LatentRanking,
    LatentScore,
    Message,
    Prompt,
    Run,
    SteeringSpec,
    StudyResult,
    StudyRow,
    Verdict,
    stable_hash,
)
from demur.verbs.config import Study, StudyConfig

SEEDLESS = ("needs",)
"""Fields of a study that change no number, and so do not make it another run."""


def run_folder(study: Study) -> Path:
    """The run folder: `--out`, or one named after the study and its settings, so that other settings never mix."""
    return study.out or Path("runs") / f"{study.config.name}-{config_hash(study.config)[:8]}"


def config_hash(config: StudyConfig) -> str:
    """Hash of everything in the study that may change a number."""
    return stable_hash({key: value for key, value in to_json(config).items() if key not in SEEDLESS})


@dataclass
class _Study:
    """A study in progress: what is loaded, and the run folder."""

    config: StudyConfig
    folder: Path
    lm: LanguageModel
    loaded: LoadedSae
    hookpoint: Hookpoint
    harmful: list[Prompt]
    plain: list[Prompt]
    sets: Sets
    completions: Completions
    measured: Measurements
    judge: RulesJudge

    @property
    def saes(self) -> dict[str, Any]:
        return {self.loaded.hash: self.loaded.sae}

    def clamp(self, latent: int, value: float) -> SteeringSpec:
        if value == 0:
            return SteeringSpec()
        return SteeringSpec((Edit(str(self.hookpoint), self.loaded.hash, latent, value),))

    def rows(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return [chat_ids(self.lm, with_system(prompt, self.config.system)) for prompt in prompts]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step of the study: announced, and its time added to the run folder's account."""
        progress.say(f"{name}")
        start = time.monotonic()
        path = self.folder / "seconds.json"
        try:
            yield
        finally:
            spent = read_json(path) if path.exists() else {}
            spent[name] = round(spent.get(name, 0.0) + time.monotonic() - start, 2)
            write_json(path, spent)


def study(study: Study) -> StudyResult:
    """Run the study and return its result, which is also `study.json` in the run folder, beside `report.html`.

    Raises `InputError`, `NotFoundError` or `MismatchError` before anything is written when model, SAE, hookpoint or
    prompt files do not fit; `RunExistsError` when the run folder holds another study.
    """
    config, folder = study.config, run_folder(study)
    start = time.monotonic()
    _check_folder(folder, config)
    if config.needs:
        progress.say(f"this study needs: {config.needs}")
    harmful = load_prompts(config.harmful.path, "harmful", config.harmful.column)
    plain = load_prompts(config.plain.path, "benign", config.plain.column)
    lookalike = load_prompts(config.lookalike.path, "benign", config.lookalike.column)
    questions = load_questions(config.questions)
    sets = Sets(
        _some(harmful, "test", config.test_harmful, config.harmful.path),
        _some(plain, "test", config.test_plain, config.plain.path),
        _some(lookalike, "test", config.test_lookalike, config.lookalike.path),
        _some(questions, "test", config.test_questions, config.questions),
    )
    loaded = load_sae(config.sae, "cpu" if config.device == "auto" else config.device)
    hookpoint = parse_hookpoint(config.hookpoint or loaded.config.hookpoint)
    progress.say(f"loading {config.model}")
    lm = load(config.model, config.dtype, config.device, config.revision)
    block_at(lm.model, hookpoint)
    check_fits(loaded, lm.name, lm.fingerprint, lm.d_model, lm.n_blocks)
    run = Run(
        kind="study",
        name=config.name,
        config=to_json(config),
        config_hash=config_hash(config),
        seed=config.seed,
        artefacts={
            "model": f"{lm.name} ({lm.origin}, {lm.fingerprint})",
            "sae": loaded.hash,
            "harmful": prompts_hash(harmful),
            "plain": prompts_hash(plain),
            "lookalike": prompts_hash(lookalike),
            "questions": prompts_hash(questions),
        },
        **provenance(),
    )
    run = _claim(folder, run)
    going = _Study(
        config,
        folder,
        lm,
        loaded,
        hookpoint,
        _some(harmful, "select", config.select_prompts, config.harmful.path),
        _some(plain, "select", config.select_prompts, config.plain.path),
        sets,
        Completions(folder / "completions.jsonl"),
        Measurements(folder / "measurements.jsonl"),
        RulesJudge(),
    )
    _add_seconds(folder, "load", time.monotonic() - start)
    result = _result(going, run)
    with going.step("report"):
        everything = [*going.harmful, *going.plain, *sets.prompts]
        shown = {prompt.id for prompt in sets.prompts}
        report = render(
            result,
            run,
            [prompt for prompt in everything if prompt.id in shown],
            [c for c in going.completions.all() if c.prompt in shown],
            [v for v in read_jsonl(Verdict, folder / "verdicts.jsonl") if v.prompt in shown],
        )
        write_text(folder / "report.html", report)
    spent = read_json(folder / "seconds.json")
    result = replace(result, step_seconds=spent, seconds=round(sum(spent.values()), 2))
    write_json(folder / "study.json", result)
    return result


def _result(going: _Study, run: Run) -> StudyResult:
    config = going.config
    with going.step("candidates"):
        found, notes, refusal = _candidates(going)
    with going.step("causal screen"):
        screened = _screen(going, found, refusal)
    with going.step("choose"):
        ranking = _choose(going, screened)
    latent = ranking.scores[0].latent
    with going.step("control"):
        control = _control(going, latent, [score.latent for score in ranking.scores])
    values = sorted({0.0, *map(float, config.values)})
    steered = [going.clamp(latent, value) for value in values]
    controls = [going.clamp(control, value) for value in values if value] if config.control else []
    specs = [*steered, *controls]
    for spec in specs:
        write_json(going.folder / "specs" / f"{spec.hash}.json", spec)
    with (
        going.step("sweep"),
        progress.track("answers", len(specs) * len(going.sets.prompts), "prompts") as advance,
    ):
        for spec in specs:
            _complete(going, going.sets.prompts, spec, advance)
    with going.step("capability"):
        _capability(going, specs)
    with going.step("divergence"):
        kl_items = _divergence(going, specs)
    verdicts = Verdicts(_judge(going, going.sets.prompts, specs))

    def rows(latent: int, wanted: Sequence[float]) -> tuple[StudyRow, ...]:
        return tuple(
            study_row(
                value,
                going.clamp(latent, value).hash,
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
    lm, loaded = going.lm, going.loaded
    return StudyResult(
        name=config.name,
        model=run.artefacts["model"],
        sae=f"{loaded.path} ({loaded.hash})",
        hookpoint=str(going.hookpoint),
        layer=going.hookpoint.block,
        latent=latent,
        control_latent=control,
        unit=(
            f"latent units: one unit moves the residual by {loaded.sae.unit:.3g} along the latent's decoder row, "
            f"which is 1/sqrt({lm.d_model}) of a typical residual's length"
        ),
        rows=table,
        control_rows=rows(control, values[1:]) if config.control else (),
        best_value=best.value,
        best_gain=gain.points.value,
        best_gain_low=gain.points.low,
        best_gain_high=gain.points.high,
        best_gain_p=gain.p,
        ranking=ranking,
        notes=tuple(notes),
        report=str((going.folder / "report.html").resolve()),
    )


def _candidates(going: _Study) -> tuple[LatentRanking, list[str], list[int]]:
    """Candidates from the archetypal prompt, what to tell the reader, and the refusal's token ids."""
    path = going.folder / "candidates.json"
    lm, config = going.lm, going.config
    prompt = Prompt("archetype", (Message("user", config.archetype),), "harmful", "study")
    if not path.exists():
        completion = _complete(going, [prompt], SteeringSpec())[0]
        by_itself = going.judge.judge(prompt, completion).label == "refused"
        refusal = text_ids(lm, completion.text if by_itself else config.refusal)
        notes = []
        if not by_itself:
            notes.append(
                "The unsteered model does not refuse the archetypal prompt by itself, so candidates were read from the "
                f"refusal that the study gives: {config.refusal!r}."
            )
        ranking = candidates(lm, going.loaded, going.hookpoint, going.rows([prompt])[0], refusal)
        write_json(path, {"ranking": to_json(ranking), "notes": notes, "refusal": refusal})
    saved = read_json(path)
    found = from_json(LatentRanking, saved["ranking"], str(path))
    progress.say(f"  {len(found.scores)} latents are active on at least two tokens of the refusal")
    return found, saved["notes"], saved["refusal"]


def _screen(going: _Study, found: LatentRanking, refusal: list[int]) -> LatentRanking:
    """Every candidate with the gain in the refusal's log-probability, best first."""
    path = going.folder / "screen.jsonl"
    done = {score.latent: score for score in read_jsonl(LatentScore, path)}
    waiting = [score.latent for score in found.scores if score.latent not in done]
    if waiting:
        prompts = going.harmful[: going.config.screen_prompts]
        wanted = refusal[: going.config.screen_tokens]
        screen = Screen(going.lm, going.loaded, going.hookpoint, going.rows(prompts), wanted)
        with progress.track("screen", len(waiting), "candidates") as advance:

            def keep(score: LatentScore) -> None:
                append_jsonl(path, [score])
                done[score.latent] = score
                advance(1)

            screen_all(screen, waiting, going.config.select_value, keep)
    scores = [
        LatentScore(
            score.latent,
            done[score.latent].score,
            {"screen": done[score.latent].score, "refusal_tokens": score.score, **score.detail},
        )
        for score in found.scores
    ]
    scores.sort(key=lambda s: -s.score)
    return replace(found, method="archetype, screen", scores=tuple(scores), prompts=prompts_hash(going.harmful))


def _choose(going: _Study, screened: LatentRanking) -> LatentRanking:
    """Finalists judged on select prompts; see `demur.features.choose`."""
    finalists = [score.latent for score in screened.scores[: going.config.finalists]]
    select = [*going.harmful, *going.plain]
    specs = {latent: going.clamp(latent, going.config.select_value) for latent in finalists}
    with progress.track("finalists", len(specs) * len(select), "prompts") as advance:
        for spec in specs.values():
            _complete(going, select, spec, advance)
    verdicts = Verdicts(_judge(going, select, list(specs.values())))
    tried = [
        Tried(
            latent,
            verdicts.refused(spec.hash, going.harmful, FULL).value,
            verdicts.refused(spec.hash, going.plain, ANY).value,
        )
        for latent, spec in specs.items()
    ]
    ranking = rank_finalists(screened, tried)
    write_json(going.folder / "ranking.json", ranking)
    progress.say(f"  latent {ranking.scores[0].latent} is chosen")
    return ranking


def _control(going: _Study, chosen: int, related: Sequence[int]) -> int:
    path = going.folder / "control.json"
    if not path.exists():
        lm, sae = going.lm, going.loaded.sae
        harmless = firing_rates(lm, sae, going.hookpoint, going.rows(going.plain))
        harmful = firing_rates(lm, sae, going.hookpoint, going.rows(going.harmful))
        control = control_latent(harmless, chosen, related, harmful)
        rates = {"chosen": float(harmless[chosen]), "control": float(harmless[control])}
        write_json(path, {"latent": control, "firing_rates": rates})
    return int(read_json(path)["latent"])


def _complete(
    going: _Study, prompts: Sequence[Prompt], spec: SteeringSpec, advance: Any = lambda amount: None
) -> list[Completion]:
    return going.completions.complete(
        going.lm,
        prompts,
        spec,
        going.saes,
        going.config.system,
        going.config.max_new_tokens,
        going.config.batch_size,
        advance,
    )


def _judge(going: _Study, prompts: Sequence[Prompt], specs: Sequence[SteeringSpec]) -> list[Verdict]:
    """Verdicts of all completions of `prompts`; the missing ones are given and kept."""
    path = going.folder / "verdicts.jsonl"
    have = {(verdict.spec, verdict.prompt): verdict for verdict in read_jsonl(Verdict, path)}
    new = [
        going.judge.judge(prompt, completion)
        for spec in specs
        for prompt, completion in zip(prompts, going.completions.of(spec.hash, prompts), strict=True)
        if (spec.hash, prompt.id) not in have
    ]
    append_jsonl(path, new)
    have |= {(verdict.spec, verdict.prompt): verdict for verdict in new}
    return [have[spec.hash, prompt.id] for spec in specs for prompt in prompts]


def _capability(going: _Study, specs: Sequence[SteeringSpec]) -> None:
    questions = going.sets.questions
    with progress.track("questions", len(questions) * len(specs), "answers") as advance:
        capability(going.lm, going.hookpoint, questions, specs, going.saes, going.measured, advance=advance)


def _divergence(going: _Study, specs: Sequence[SteeringSpec]) -> list[str]:
    """Measure KL under every spec; returns the ids of the prompts it was measured on."""
    completions = going.completions.of(UNSTEERED, going.sets.plain)
    answered = [
        (prompt.id, row, text_ids(going.lm, completion.text))
        for prompt, row, completion in zip(going.sets.plain, going.rows(going.sets.plain), completions, strict=True)
        if completion.text
    ]
    with progress.track("divergence", len(answered) * len(specs), "texts") as advance:
        divergence(going.lm, going.hookpoint, answered, specs, going.saes, going.measured, advance=advance)
    return [item[0] for item in answered]


def _some(items: Sequence[Any], split: Any, limit: int, name: str) -> list[Any]:
    chosen = take(items, split, limit)
    if not chosen:
        raise InputError(
            f"{name} has no prompts in its {split} split; choosing and reporting need different prompts: "
            "add rows, or a `split` column with select and test"
        )
    return chosen


def _check_folder(folder: Path, config: StudyConfig) -> None:
    """Raise `RunExistsError` when `folder` holds the run of another study."""
    path = folder / "run.json"
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunExistsError(f"{folder} exists and is no run of demur; choose another --out folder")
        return
    found = read_json(path)
    if not isinstance(found, dict) or found.get("config_hash") != config_hash(config):
        old = found.get("config", {}) if isinstance(found, dict) else {}
        differs = [k for k, v in to_json(config).items() if k not in SEEDLESS and old.get(k) != v]
        raise RunExistsError(
            f"{folder} holds a run with other settings (it differs in {', '.join(differs) or 'its format'}); "
            "choose another --out folder, or repeat its settings to go on"
        )


def _claim(folder: Path, run: Run) -> Run:
    """Write `run.json`, or check that the run found there used the same artefacts; returns the first session's."""
    path = folder / "run.json"
    if not path.exists():
        write_json(path, run)
        return run
    found = from_json(Run, read_json(path), str(path))
    changed = [key for key, value in run.artefacts.items() if found.artefacts.get(key) != value]
    if changed:
        raise RunExistsError(
            f"{folder} holds a run made with another {' and '.join(changed)} than is there now; "
            "choose another --out folder"
        )
    return found


def _add_seconds(folder: Path, name: str, seconds: float) -> None:
    path = folder / "seconds.json"
    spent = read_json(path) if path.exists() else {}
    write_json(path, {**spent, name: round(spent.get(name, 0.0) + seconds, 2)})
