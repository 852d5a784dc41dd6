"""A search in progress: what is loaded, the screen of a spec, and its judged answers, kept in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock

from demur import progress
from demur.data.prompts import load_questions, prompts_hash, spread, take
from demur.data.suites import load_suite
from demur.errors import InputError
from demur.eval.capability import capability
from demur.eval.complete import Completions
from demur.eval.divergence import divergence
from demur.eval.front import Look
from demur.eval.measurements import Measurements
from demur.eval.rows import ANY, FULL, refused_rate
from demur.eval.statistics import bootstrap_mean, rate
from demur.features.proposers import METHODS
from demur.features.reach import Gates
from demur.features.referee import Referee
from demur.judges.rules import RulesJudge
from demur.lm.chat import chat_ids, text_ids, with_system
from demur.lm.hookpoints import device_at
from demur.lm.load import LanguageModel, load
from demur.record import from_json, provenance, read_json, to_json, write_json
from demur.results import Tried
from demur.sae.store import LoadedSae, check_fits, load_sae
from demur.spec import SteeringSpec
from demur.steering.artefacts import Artefacts
from demur.steering.edits_at import lowest_hookpoint
from demur.steering.probe import Probe, load_probe
from demur.types import UNSTEERED, Estimate, Label, Prompt, Question, Run, parse_hookpoint
from demur.verbs.config import DiscoveryConfig
from demur.verbs.discover import proposed
from demur.verbs.eval_config import named_limit
from demur.verbs.finding import ANSWER_TOKENS, Finding
from demur.verbs.optimize_config import OptimizeConfig
from demur.verbs.optimize_space import Layer, ProbeAt, Space, words
from demur.verbs.run_folder import Clock, config_hash

RESULT = "optimize.json"
_TRY = 8.0
"""Clamp value at which proposed latents are compared."""


@dataclass
class Optimizing:
    """A search in progress."""

    config: OptimizeConfig
    folder: Path
    lm: LanguageModel
    saes: list[LoadedSae]
    probes: list[Probe]
    harmful: list[Prompt]
    benign: list[Prompt]
    plain: list[Prompt]
    """Demur's own, on whose unsteered answers KL is measured."""
    questions: list[Question]
    clock: Clock
    judge: RulesJudge

    @cached_property
    def base(self) -> Completions:
        """The unsteered model's answers, to plain prompts too."""
        found = Completions(self._of(UNSTEERED) / "completions.jsonl")
        wanted = list({prompt.id: prompt for prompt in (*self.harmful, *self.benign, *self.plain)}.values())
        config = self.config
        with progress.track("unsteered answers", len(wanted), "prompts") as advance:
            found.complete(
                self.lm, wanted, SteeringSpec(), self.saes, config.system, config.max_new_tokens, config.batch_size,
                advance,
            )  # fmt: skip
        return found

    @cached_property
    def unsteered(self) -> Tried:
        """The unsteered model."""
        return self.judged(SteeringSpec(), -1)

    @cached_property
    def space(self) -> Space:
        """What may be tried: found once, kept in `space.json`."""
        path = self.folder / "space.json"
        if not path.exists():
            layers = tuple(self._layer(sae, finding) for sae, finding in zip(self.saes, self.findings, strict=True))
            write_json(path, Space(layers, tuple(ProbeAt(one.hookpoint, one.hash) for one in self.probes)))
        return from_json(Space, read_json(path), str(path))

    def prepare(self) -> None:
        """Do and keep what every process needs, before several of them would."""
        assert self.unsteered.spec == UNSTEERED
        assert self.space.layers
        assert self._screens

    def rows(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of the conversations."""
        return [chat_ids(self.lm, with_system(prompt, self.config.system)) for prompt in prompts]

    @cached_property
    def _gates(self) -> Gates:
        return Gates(self.lm, Artefacts(self.lm.model, self.saes, self.probes, {}))

    @cached_property
    def findings(self) -> list[Finding]:
        """What proposes latents and knows how the model refuses, for each SAE."""
        config = self.config
        discovery = DiscoveryConfig(
            system=config.system,
            select_prompts=len(self.harmful),
            screen_prompts=config.screen_prompts,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        found = []
        for sae in self.saes:
            place = parse_hookpoint(sae.config.hookpoint)
            folder = self.folder / "pool" / f"{place}-{sae.hash}"
            finding = Finding(
                discovery, folder, self.lm, sae, place, self.harmful, self.plain, Clock(folder, "none"), self.judge
            )
            finding.completions.add(self.base.all())
            found.append(finding)
        return found

    def _layer(self, sae: LoadedSae, finding: Finding) -> Layer:
        config = self.config
        latents = config.latents
        if not latents:
            some = list(proposed(finding, finding.propose()))
            raised = finding.log_odds([finding.clamp(latent, _TRY) for latent in some]).mean(1)
            latents = tuple(some[i] for i in raised.argsort(descending=True, stable=True)[: config.pool].tolist())
        gates: dict[int, float] = {}
        if "latent" in config.gates:
            setting = finding.setting()
            most = setting.harmful_latents.amax(0)
            ranked = [one.latent for one in METHODS["auroc"](setting).scores]
            chosen = config.gate_latents or [latent for latent in ranked if most[latent] > 0][: config.gate_pool]
            gates = {latent: float(most[latent]) for latent in chosen}
        return Layer(str(finding.hookpoint), sae.hash, latents, gates)

    @cached_property
    def _screens(self) -> dict[str, tuple[Referee, Look]]:
        """For each hookpoint the referee with the log-odds of the unsteered model."""
        n, found = self.config.screen_prompts, {}
        first = self.findings[0]
        harmful = self.rows(first.screened[:n])
        some = spread(self.benign, n)
        said = [text_ids(self.lm, one.text)[:ANSWER_TOKENS] for one in self.base.of(UNSTEERED, some)]
        items = [(row, answer) for row, answer in zip(self.rows(some), said, strict=True) if answer]
        for finding in self.findings:
            referee = Referee(
                self.lm, finding.hookpoint, first.openings, harmful, items, self.saes, self.probes
            )  # fmt: skip
            found[str(finding.hookpoint)] = referee, _look(referee, SteeringSpec())
        return found

    def look(self, spec: SteeringSpec) -> Look:
        """What the screen sees of `spec`; nothing is generated."""
        referee, before = self._screens[spec.edits[0].hookpoint]
        after = _look(referee, spec)
        changes = [
            [a - b for a, b in zip(mine, base, strict=True)]
            for mine, base in ((after.harmful, before.harmful), (after.benign, before.benign))
        ]
        return Look(changes[0], changes[1], after.kl)

    def judged(self, spec: SteeringSpec, number: int) -> Tried:
        """All measures of `spec`, from its own folder where they are there. One process at a time measures a spec."""
        config, folder = self.config, self._of(spec.hash)
        base = self.base
        folder.mkdir(parents=True, exist_ok=True)
        prompts = [*self.harmful, *self.benign]
        with FileLock(folder / ".lock"):
            write_json(folder / "spec.json", spec)
            answers = base if spec.hash == UNSTEERED else self._answers(spec, folder, prompts)
            measured = Measurements(folder / "measurements.jsonl")
            place = lowest_hookpoint([spec]) or parse_hookpoint(self.saes[0].config.hookpoint)
            said = zip(self.plain, self.rows(self.plain), base.of(UNSTEERED, self.plain), strict=True)
            items = [(prompt.id, row, ids) for prompt, row, one in said if (ids := text_ids(self.lm, one.text))]
            divergence(self.lm, place, items, [spec], self.saes, measured, directions=self.probes)
            capability(self.lm, place, self.questions, [spec], self.saes, measured, directions=self.probes)
        labels = [
            self.judge.judge(prompt, one).label
            for prompt, one in zip(prompts, answers.of(spec.hash, prompts), strict=True)
        ]
        n = len(self.harmful)
        kl = measured.values("kl", spec.hash, [item for item, _, _ in items])
        right = measured.values("capability", spec.hash, [question.id for question in self.questions])
        label = words(spec) if spec.edits else UNSTEERED
        return _tried(number, label, spec.hash, labels[:n], labels[n:], kl, right, config.seed)

    def _answers(self, spec: SteeringSpec, folder: Path, prompts: Sequence[Prompt]) -> Completions:
        """Answers under `spec`; where its gate stays shut they are the unsteered ones, and not generated again."""
        config = self.config
        answers = Completions(folder / "completions.jsonl")
        opened = self._gates.opened(spec, self.rows(prompts)).tolist()
        shut = [prompt for prompt, how_far in zip(prompts, opened, strict=True) if not how_far]
        answers.add([replace(one, spec=spec.hash) for one in self.base.of(UNSTEERED, shut)])
        left = [prompt for prompt, how_far in zip(prompts, opened, strict=True) if how_far]
        answers.complete(
            self.lm, left, spec, self.saes, config.system, config.max_new_tokens, config.batch_size,
            directions=self.probes,
        )  # fmt: skip
        return answers

    def _of(self, spec: str) -> Path:
        return self.folder / "specs" / spec


def _look(referee: Referee, spec: SteeringSpec) -> Look:
    damage = referee.damage([spec])
    return Look(referee.log_odds([spec])[0].tolist(), damage.log_odds[0].tolist(), damage.kl[0].tolist())


def _tried(
    number: int,
    label: str,
    spec: str,
    harmful: Sequence[Label],
    benign: Sequence[Label],
    kl: Sequence[float],
    right: Sequence[float],
    seed: int,
) -> Tried:
    scored = [label for label in (*harmful, *benign) if label != "unscored"]
    return Tried(
        number,
        label,
        spec,
        refused_rate(harmful, FULL),
        refused_rate(benign, ANY),
        refused_rate(benign, frozenset({"degenerate"})),
        refused_rate(benign, ANY | {"degenerate"}),
        rate(scored.count("degenerate"), len(scored)),
        len(harmful) + len(benign) - len(scored),
        Estimate(*bootstrap_mean(kl, seed), len(kl)),
        rate(int(sum(right)), len(right)),
    )


def begin(config: OptimizeConfig, folder: Path) -> tuple[Optimizing, Run]:
    """Load everything that `config` names; nothing is written.

    Raises as `load_suite`, `load_sae`, `load_probe`, `load` and `check_fits` do, and `InputError` where harmful or
    benign prompts are missing or a probe reads above every SAE.
    """
    harmful, benign = _prompts(config)
    plain = take(load_suite("plain"), "select", config.damage_prompts)
    questions = take(load_questions(), "select", config.questions)
    saes = [load_sae(name) for name in config.sae]
    for latent in (*config.latents, *config.gate_latents):
        if latent >= saes[0].sae.d_sae:
            raise InputError(
                f"latent {latent} does not exist; the SAE {saes[0].path!r} has latents 0 to {saes[0].sae.d_sae - 1}"
            )
    probes = [load_probe(path) for path in config.probe]
    highest = max(parse_hookpoint(sae.config.hookpoint).block for sae in saes)
    for path, probe in zip(config.probe, probes, strict=True):
        if parse_hookpoint(probe.hookpoint).block > highest:
            raise InputError(
                f"the probe {path} reads {probe.hookpoint}, above every SAE that was given, so that it would decide "
                "too late; give one that reads lower, or an SAE further up"
            )
    progress.say(f"loading {config.model}")
    lm = load(config.model, config.dtype, config.device, config.revision)
    for sae in saes:
        device = device_at(lm.model, parse_hookpoint(sae.config.hookpoint))
        check_fits(sae, lm.name, lm.fingerprint, lm.d_model, lm.n_blocks)
        sae.sae.to(device)
    run = Run(
        kind="optimize",
        name="optimize",
        config=to_json(config),
        config_hash=config_hash(config),
        seed=config.seed,
        artefacts={
            "model": lm.identity,
            "saes": ", ".join(sae.hash for sae in saes),
            "probes": ", ".join(probe.hash for probe in probes),
            "prompts": prompts_hash([*harmful, *benign, *plain, *questions]),
        },
        **provenance(),
    )
    clock = Clock(folder, "none")  # a run may always be given more trials
    return Optimizing(config, folder, lm, saes, probes, harmful, benign, plain, questions, clock, RulesJudge()), run


def _prompts(config: OptimizeConfig) -> tuple[list[Prompt], list[Prompt]]:
    found: list[Prompt] = []
    for given in config.suite:
        name, limit = named_limit(given)
        found += take(load_suite(name, config.data_dir), "select", limit)
    if twice := [p.id for i, p in enumerate(found) if p.id in {other.id for other in found[:i]}]:
        raise InputError(
            f"the prompt id {twice[0]!r} occurs twice; name each suite once, and give files ids of their own"
        )
    harmful = [prompt for prompt in found if prompt.intent == "harmful"]
    benign = [prompt for prompt in found if prompt.intent == "benign"]
    for kind, prompts in (("harmful", harmful), ("benign", benign)):
        if not prompts:
            raise InputError(
                f"{', '.join(config.suite)} have no {kind} prompt in their select split; a search weighs harmful "
                "against benign ones, so give a suite of each"
            )
    return harmful, benign


def threads(workers: int) -> None:
    """Share the processor among `workers`."""
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
