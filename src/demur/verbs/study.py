"""`demur study`: find the latent, choose it causally, clamp it, measure both sides, report.

Every step writes what it found into the run folder and is skipped when it is already there, so a run that was killed
goes on to the same numbers. Choosing looks at the select split only, reporting at the test split only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from demur import progress
from demur.data.prompts import OWN, load_prompts, load_questions, prompts_hash, take
from demur.errors import InputError, RunExistsError
from demur.eval.capability import capability
from demur.eval.complete import Completions
from demur.eval.divergence import divergence
from demur.eval.measurements import Measurements
from demur.eval.rows import ANY, FULL, Sets, Verdicts, refusal_gain, study_row
from demur.features.archetype import candidates, usual_refusal
from demur.features.choose import Tried, rank_finalists
from demur.features.control import control_latent, firing_rates
from demur.features.screen import rank_screened
from demur.judges.rules import RulesJudge
from demur.lm.chat import chat_ids, text_ids, with_system
from demur.lm.hookpoints import device_at
from demur.lm.load import LanguageModel, load
from demur.record import (
    append_jsonl,
    from_json,
    provenance,
    read_json,
    read_jsonl,
    storage,
    to_json,
    write_json,
    write_text,
)
from demur.report.html import render
from demur.sae.store import LoadedSae, check_fits, load_sae
from demur.spec import Edit, SteeringSpec
from demur.types import (
    UNSTEERED,
    Completion,
    Hookpoint,
    Intent,
    Label,
    LatentRanking,
    Message,
    Prompt,
    Run,
    StudyResult,
    StudyRow,
    Verdict,
    parse_hookpoint,
    stable_hash,
)
from demur.verbs.config import PromptFile, StudyConfig

SEEDLESS = ("needs",)
"""Fields of a study that change no number, and so do not make it another run."""
_USUAL = 24
"""Harmful select prompts on which the model's own refusals are looked for."""
_ANY_REFUSAL = "I'm sorry, but I can't help with that."


def run_folder(config: StudyConfig) -> Path:
    """The usual run folder: named after the study and its settings, so that other settings never mix."""
    return Path("runs") / f"{config.name}-{config_hash(config)[:8]}"


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
    usual: list[Prompt]
    """Harmful select prompts that show how the model refuses."""
    sets: Sets
    judge: RulesJudge = field(default_factory=RulesJudge)

    @cached_property
    def completions(self) -> Completions:
        return Completions(self.folder / "completions.jsonl")

    @cached_property
    def measured(self) -> Measurements:
        return Measurements(self.folder / "measurements.jsonl")

    @property
    def saes(self) -> dict[str, Any]:
        return {self.loaded.hash: self.loaded.sae}

    def clamp(self, latent: int, value: float) -> SteeringSpec:
        if value == 0:
            return SteeringSpec()
        return SteeringSpec((Edit(str(self.hookpoint), self.loaded.hash, (latent,), value),))

    def rows(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return [chat_ids(self.lm, with_system(prompt, self.config.system)) for prompt in prompts]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step of the study: announced, and its time added to the run folder's account."""
        progress.say(name)
        start = time.monotonic()
        try:
            yield
        finally:
            _add_seconds(self.folder, name, time.monotonic() - start)


def study(config: StudyConfig, out: Path | None = None) -> StudyResult:
    """Run the study and return its result, which is also `study.json` in the run folder, beside `report.html`.

    The run folder is `out`, else `run_folder(config)`; a run of the same study found there goes on. Raises
    `InputError`, `NotFoundError` or `MismatchError` before anything is written when model, SAE, hookpoint or prompt
    files do not fit; `RunExistsError` when the run folder holds another study.
    """
    folder = out or run_folder(config)
    start = time.monotonic()
    _check_folder(folder, config)
    if config.needs:
        progress.say(f"this study needs: {config.needs}")
    harmful = _prompts("harmful", config.harmful, "harmful")
    plain = _prompts("plain", config.plain, "benign")
    lookalike = _prompts("lookalike", config.lookalike, "benign")
    questions = load_questions(config.questions)
    sets = Sets(
        _some(harmful, "test", config.test_harmful, config.harmful.path),
        _some(plain, "test", config.test_plain, config.plain.path),
        _some(lookalike, "test", config.test_lookalike, config.lookalike.path),
        _some(questions, "test", config.test_questions, config.questions),
    )
    loaded = load_sae(config.sae)
    hookpoint = parse_hookpoint(config.hookpoint or loaded.config.hookpoint)
    progress.say(f"loading {config.model}")
    lm = load(config.model, config.dtype, config.device, config.revision)
    device = device_at(lm.model, hookpoint)
    check_fits(loaded, lm.name, lm.fingerprint, lm.d_model, lm.n_blocks)
    loaded.sae.to(device)
    run = Run(
        kind="study",
        name=config.name,
        config=to_json(config),
        config_hash=config_hash(config),
        seed=config.seed,
        artefacts={
            "model": f"{lm.name} ({lm.origin}, weights {lm.weights})",
            "sae": loaded.hash,
            "harmful": prompts_hash(harmful),
            "plain": prompts_hash(plain),
            "lookalike": prompts_hash(lookalike),
            "questions": prompts_hash(questions),
        },
        **provenance(),
    )
    going = _Study(
        config,
        folder,
        lm,
        loaded,
        hookpoint,
        _some(harmful, "select", config.select_prompts, config.harmful.path),
        _some(plain, "select", config.select_prompts, config.plain.path),
        _some(harmful, "select", _USUAL, config.harmful.path),
        sets,
    )
    with _alone(folder):
        run = _claim(folder, config, run)
        _add_seconds(folder, "load", time.monotonic() - start)
        result = _result(going, run)
        with going.step("report"):
            _report(going, result, run)
        result = _with_seconds(result, folder)
        write_json(folder / "study.json", result)
    return result


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the run folder's lock: two processes in one folder would write over each other."""
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise RunExistsError(
                f"{folder} is in use by another demur study; wait for it to end, or choose another --out folder"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _report(going: _Study, result: StudyResult, run: Run) -> None:
    shown = {prompt.id for prompt in going.sets.prompts}
    report = render(
        _with_seconds(result, going.folder),
        run,
        [replace(prompt, messages=with_system(prompt, going.config.system)) for prompt in going.sets.prompts],
        [c for c in going.completions.all() if c.prompt in shown],
        [v for v in read_jsonl(Verdict, going.folder / "verdicts.jsonl") if v.prompt in shown],
    )
    write_text(going.folder / "report.html", report)


def _result(going: _Study, run: Run) -> StudyResult:
    config = going.config
    with going.step("candidates"):
        found, notes = _candidates(going)
    with going.step("causal screen"):
        screened = _screen(going, found)
    with going.step("choose"):
        ranking = _choose(going, screened)
    latent = ranking.scores[0].latent
    control = None
    if config.control:
        with going.step("control"):
            control = _control(going, latent, [score.latent for score in ranking.scores])
    values = sorted({0.0, *config.values})
    steered = [going.clamp(latent, value) for value in values]
    controls = [going.clamp(control, value) for value in values if value] if control is not None else []
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
    if str(going.hookpoint) != str(parse_hookpoint(loaded.config.hookpoint)):
        notes.append(f"The SAE was trained at {loaded.config.hookpoint}, but the study steers at {going.hookpoint}.")
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
        control_rows=rows(control, values[1:]) if control is not None else (),
        best_value=best.value,
        best_gain=gain.points.value,
        best_gain_low=gain.points.low,
        best_gain_high=gain.points.high,
        best_gain_p=gain.p,
        ranking=ranking,
        notes=tuple(notes),
        report=str((going.folder / "report.html").resolve()),
    )


def _candidates(going: _Study) -> tuple[LatentRanking, list[str]]:
    """Candidates from the archetypal prompt, and what to tell the reader."""
    path = going.folder / "candidates.json"
    lm, config = going.lm, going.config
    prompt = Prompt("archetype", (Message("user", config.archetype),), "harmful", "study")
    if not path.exists():
        completion = _complete(going, [prompt], SteeringSpec())[0]
        notes = []
        text = completion.text
        if going.judge.judge(prompt, completion).label != "refused":
            text, whose = _refusal(going)
            notes.append(
                "The unsteered model does not refuse the archetypal prompt by itself, so candidates were read from "
                f"{whose}: {text!r}."
            )
        refusal = text_ids(lm, text)
        ranking = candidates(lm, going.loaded, going.hookpoint, going.rows([prompt])[0], refusal)
        write_json(path, {"ranking": to_json(ranking), "notes": notes})
    saved = read_json(path)
    found = from_json(LatentRanking, saved["ranking"], str(path))
    progress.say(f"  {len(found.scores)} latents are active on at least two tokens of the refusal")
    return found, saved["notes"]


def _refusal(going: _Study) -> tuple[str, str]:
    """A refusal to put in the model's mouth, and whose it is."""
    if going.config.refusal.strip():
        return going.config.refusal, "the refusal that the study gives"
    if text := usual_refusal(list(_own_refusals(going).values())):
        return text, f"its most frequent refusal of {len(going.usual)} harmful select prompts"
    return _ANY_REFUSAL, "a usual refusal, because it refuses no harmful select prompt either"


def _own_refusals(going: _Study) -> dict[str, str]:
    """What the unsteered model says to harmful select prompts that it refuses, by prompt id."""
    said = _complete(going, going.usual, SteeringSpec())
    verdicts = _judge(going, going.usual, [SteeringSpec()])
    return {v.prompt: c.text for v, c in zip(verdicts, said, strict=True) if v.label == "refused"}


def _screen(going: _Study, found: LatentRanking) -> LatentRanking:
    """Candidates by the share of a few prompts that each makes the model refuse; completions in `screen.jsonl`."""
    config = going.config
    latents = [score.latent for score in found.scores][: config.screen_candidates or None]
    by_itself = _own_refusals(going)
    open_ones = [prompt for prompt in going.usual if prompt.id not in by_itself]
    prompts = (open_ones + [prompt for prompt in going.usual if prompt.id in by_itself])[: config.screen_prompts]
    asked = [(going.clamp(latent, config.select_value), prompt) for latent in latents for prompt in prompts]
    with progress.track("screen", len(asked), "prompts") as advance:
        said = Completions(going.folder / "screen.jsonl").complete(
            going.lm,
            [prompt for _, prompt in asked],
            [spec for spec, _ in asked],
            going.saes,
            config.system,
            config.screen_tokens,
            config.batch_size,
            advance,
        )
    labels = [going.judge.judge(prompt, one).label for (_, prompt), one in zip(asked, said, strict=True)]
    refused = {
        latent: labels[i * len(prompts) : (i + 1) * len(prompts)].count("refused") / len(prompts)
        for i, latent in enumerate(latents)
    }
    return rank_screened(found, refused, prompts_hash(going.harmful))


def _choose(going: _Study, screened: LatentRanking) -> LatentRanking:
    """Finalists judged on harmful select prompts, and on plain ones where that is a tie."""
    finalists = [score.latent for score in screened.scores[: going.config.finalists]]
    specs = {latent: going.clamp(latent, going.config.select_value) for latent in finalists}
    harmful = _refused(going, going.harmful, specs, FULL)
    tied = [latent for latent in finalists if harmful[latent] == max(harmful.values())]
    plain = _refused(going, going.plain, {latent: specs[latent] for latent in tied}, ANY) if len(tied) > 1 else {}
    ranking = rank_finalists(screened, [Tried(i, harmful[i], plain.get(i)) for i in finalists])
    write_json(going.folder / "ranking.json", ranking)
    progress.say(f"  latent {ranking.scores[0].latent} is chosen")
    return ranking


def _refused(
    going: _Study, prompts: Sequence[Prompt], specs: dict[int, SteeringSpec], counts: frozenset[Label]
) -> dict[int, float]:
    """Share of select prompts refused under each latent's spec."""
    with progress.track("finalists", len(specs) * len(prompts), "prompts") as advance:
        for spec in specs.values():
            _complete(going, prompts, spec, advance)
    verdicts = Verdicts(_judge(going, prompts, list(specs.values())))
    shares = {latent: verdicts.refused(spec.hash, prompts, counts) for latent, spec in specs.items()}
    return {latent: share.k / max(share.n, 1) for latent, share in shares.items()}


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
    kept = [verdict for verdict in read_jsonl(Verdict, path) if verdict.judge == going.judge.name]
    have = {(verdict.spec, verdict.prompt): verdict for verdict in kept}
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


def _prompts(name: str, file: PromptFile, intent: Intent) -> list[Prompt]:
    """The prompts of one set; ids of a user's file get the set's name, as two files may use the same ids."""
    prompts = load_prompts(file.path, intent, file.column)
    if file.path in OWN:
        return prompts
    return [replace(p, id=f"{name}/{p.id}", source=f"{name}: {p.source}") for p in prompts]


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
        # names with a dot are ours: the lock, or what a kill left of a write
        if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
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


def _claim(folder: Path, config: StudyConfig, run: Run) -> Run:
    """Write `run.json`, or check that the run found there used the same artefacts; returns the first session's."""
    path = folder / "run.json"
    if not path.exists():
        write_json(path, run)
        return run
    _check_folder(folder, config)
    found = from_json(Run, read_json(path), str(path))
    changed = [key for key, value in run.artefacts.items() if found.artefacts.get(key) != value]
    if changed:
        raise RunExistsError(
            f"{folder} holds a run made with another {' and '.join(changed)} than is there now; "
            "choose another --out folder"
        )
    return found


def _with_seconds(result: StudyResult, folder: Path) -> StudyResult:
    spent = read_json(folder / "seconds.json")
    return replace(result, step_seconds=spent, seconds=round(sum(spent.values()), 2))


def _add_seconds(folder: Path, name: str, seconds: float) -> None:
    path = folder / "seconds.json"
    if (folder / "study.json").exists():
        return  # a finished run that is looked at again does not take longer for it
    spent = read_json(path) if path.exists() else {}
    write_json(path, {**spent, name: round(spent.get(name, 0.0) + seconds, 2)})
