"""`demur gate train`: a probe that opens a gate for harmful prompts, chosen and calibrated out of fold, then measured.

What is read of the prompts is kept in the run folder, so a run that was killed goes on. The folder is one that
`demur serve --spec` takes: the probe, and the gated spec where one was to be made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from demur import progress
from demur.data.prompts import spread
from demur.errors import InputError
from demur.eval.attention_fit import EPOCHS, fit_attention
from demur.eval.probe_fit import (
    FOLDS,
    Bin,
    Fit,
    Kind,
    alarm_rate,
    auroc,
    calibration,
    fit_probe,
    threshold_for,
    weights_of,
)
from demur.features.proposers.probe import sparse_weights
from demur.lm.chat import chat_ids, with_system
from demur.lm.generate import generate
from demur.lm.harvest import STORED
from demur.lm.hookpoints import device_at
from demur.lm.load import LanguageModel, load
from demur.record import from_json, read_json, to_json, whole_file, write_json, write_text
from demur.sae.store import check_fits, load_sae
from demur.spec import ProbeGate
from demur.steering.edits_at import lowest_hookpoint
from demur.steering.probe import Pool, Probe, save_probe
from demur.steering.probe_inputs import At, Inputs, probabilities_written, probe_inputs
from demur.steering.spec_file import read_spec, write_spec
from demur.types import Estimate, Hookpoint, Prompt, Run, parse_hookpoint, stable_hash
from demur.verbs.gate_config import GateConfig, GateTrain
from demur.verbs.gate_prompts import Example, Source, has_answer, reported_prompts, training_prompts
from demur.verbs.run_folder import Clock, alone, check_folder, claim, config_hash, new_run

RESULT = "trained.json"
_CHUNK = 256
"""Prompts read between two writes to disk."""
_INVERSE_PENALTY = 0.1
"""Of the sparse regression that chooses latents, scikit-learn's C."""
_ALLOWED = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
"""Shares of look-alikes at which other thresholds are told."""
_MONITORED, _MONITOR_TOKENS = 100, 64
"""Answers that the monitor's threshold is set on, and their length."""


WhichTurns = Literal["all", "first", "later"]
"""All prompts, or those that begin a conversation, or those that go on with one."""


@dataclass(frozen=True)
class Tried:
    """One place where the probe could read."""

    hookpoint: str
    pool: Pool
    penalty: float | None
    """scikit-learn's C, chosen out of fold; of pool attention none."""
    auroc: float
    """Out of fold, each kind of prompt counting as `fit_probe` says."""


@dataclass(frozen=True)
class Operating:
    """What another threshold would do, out of fold."""

    lookalike_alarms: float
    """The share of look-alikes that was allowed."""
    turns: WhichTurns
    """Of which prompts all this is said."""
    threshold: float
    caught: float
    """Share of harmful prompts above the threshold under every system prompt."""
    alarms: dict[str, float]
    """Share of each other kind above it under some system prompt."""


@dataclass(frozen=True)
class Opens:
    """How often the gate opens for prompts that nothing was chosen on."""

    suite: str
    intent: str
    share: Estimate
    """With its Clopper-Pearson interval."""
    monitored: Estimate | None = None
    """Of the answers of the model, unsteered, to those for which it stays shut: in how many it opens on the way."""


@dataclass(frozen=True)
class TrainedGate:
    """What `demur gate train` made, and how good it is."""

    probe: str
    """The file."""
    spec: str
    """The gated spec; empty if none was asked for."""
    hash: str
    gate: ProbeGate
    pool: Pool
    """What its probe reads; with the gate's hookpoint the best of those `tried`."""
    model: str
    sources: tuple[Source, ...]
    tried: tuple[Tried, ...]
    auroc: dict[str, Estimate]
    """Out of fold, harmful prompts against each other kind."""
    caught: Estimate
    """Out of fold, share of harmful prompts for which the gate opens under every system prompt."""
    alarms: dict[str, Estimate]
    """Out of fold, of each other kind, under some system prompt."""
    suites: dict[str, Estimate]
    """Both, of each suite."""
    points: tuple[Operating, ...]
    """Other thresholds that keep the promise for benign prompts, for whoever wants a stricter or a milder gate."""
    curve: tuple[Bin, ...]
    """Calibration, out of fold."""
    opens: tuple[Opens, ...]
    """On test prompts."""
    seconds: dict[str, float]


def gate_train(config: GateTrain) -> TrainedGate:
    """Train the gate; the result is also `trained.json` in the run folder, beside `probe.safetensors` and `card.md`.

    Raises `InputError`, `NotFoundError` or `MismatchError` when prompts, model, SAE, spec or hookpoint do not fit, and
    `RunExistsError` when the run folder holds another run.
    """
    what = config.config
    start = time.monotonic()
    folder = config.out or Path("runs") / f"{what.name}-{config_hash(what)[:8]}"
    check_folder(folder, what)
    training = _Training(what, folder)
    with alone(folder):
        begun = training.run()
        run = claim(folder, what, begun)
        training.clock.add("load", time.monotonic() - start)
        if (folder / RESULT).exists():  # it is written last
            return from_json(TrainedGate, read_json(folder / RESULT), str(folder / RESULT))
        found = training.train(begun)
        write_text(folder / "card.md", _card(found, run))
        write_json(folder / RESULT, found)
    return found


class _Training:
    def __init__(self, config: GateConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.clock = Clock(folder, RESULT)
        self.spec = read_spec(config.spec) if config.spec is not None else None
        if self.spec is not None and self.spec.gate is not None:
            raise InputError(f"{config.spec} has a gate already; give a spec without one")
        self.examples, self.sources = training_prompts(config)
        self.sae = load_sae(config.sae) if self._needs_sae() else None
        self.places = self._places()
        progress.say(f"loading {config.model}")
        self.lm: LanguageModel = load(config.model, config.dtype, config.device, config.revision)
        for place in self.places:
            device_at(self.lm.model, place)
        if self.sae is not None:
            check_fits(self.sae, self.lm.name, self.lm.fingerprint, self.lm.d_model, self.lm.n_blocks)
            self.sae.sae.to(device_at(self.lm.model, self.places[0]))

    def _needs_sae(self) -> bool:
        return self.config.inputs == "latents" or (self.spec is None and not self.config.hookpoint)

    def _places(self) -> list[Hookpoint]:
        if self.config.hookpoint:
            places = [parse_hookpoint(one) for one in self.config.hookpoint]
        elif self.spec is not None:
            lowest = lowest_hookpoint([self.spec])
            if lowest is None:
                raise InputError(f"{self.config.spec} edits nothing, so there is nothing to gate; give another spec")
            places = [lowest]
        else:
            assert self.sae is not None
            places = [parse_hookpoint(self.sae.config.hookpoint)]
        lowest = lowest_hookpoint([self.spec]) if self.spec is not None else None
        if lowest is not None and (above := [one for one in places if one.block > lowest.block]):
            raise InputError(
                f"the probe would read {above[0]}, which comes after the spec's edit at {lowest}; give that hookpoint "
                "or a lower one"
            )
        return places

    def run(self) -> Run:
        """What the run folder is claimed for."""
        return new_run(
            "gate",
            self.config,
            {
                "model": self.lm.identity,
                "prompts": stable_hash([asdict(one) for one in self.sources]),
                "sae": self.sae.hash if self.sae is not None else "",
                "spec": self.spec.hash if self.spec is not None else "",
            },
        )

    def train(self, run: Run) -> TrainedGate:
        """All of it."""
        config = self.config
        systems = len(config.system)
        kinds: list[Kind] = [one.kind for one in self.examples for _ in range(systems)]
        groups = [one.group for one in self.examples for _ in range(systems)]
        with self.clock.step("reading prompts"):
            inputs = self._inputs(self.examples)
        tried: dict[At, tuple[Fit, list[int]]] = {}
        with self.clock.step("fitting"):
            for place, x in inputs.at.items():
                if place[1] == "attention":
                    with progress.track(f"fitting at {place[0]}", FOLDS * EPOCHS, "epochs") as advance:
                        lengths = inputs.lengths.tolist()
                        tried[place] = fit_attention(x, lengths, kinds, groups, config.seed, advance), []
                    continue
                chosen = self._latents(x, kinds)
                columns = x[:, chosen] if chosen else x
                tried[place] = fit_probe(columns.double().numpy(), kinds, groups, config.seed), chosen
        at = max(tried, key=lambda one: tried[one][0].auroc)
        fit, chosen = tried[at]
        # a prompt counts by the system prompt under which it is likeliest to open the gate
        worst = fit.out_of_fold.reshape(-1, systems)
        each: list[Kind] = [one.kind for one in self.examples]
        decides = [
            float(low if one.kind == "harmful" else high)
            for one, low, high in zip(self.examples, worst.min(1), worst.max(1), strict=True)
        ]
        first, later = self._thresholds(decides)
        probe = Probe(
            torch.from_numpy(fit.weight).float(),
            fit.bias,
            str(at[0]),
            at[1],
            self.sae.hash if self.sae is not None and chosen else "",
            tuple(chosen),
            fit.attention,
        )
        monitor = 1.0
        if config.monitor:
            with self.clock.step("answers to be monitored"):
                monitor = self._monitor(probe)
        gate = ProbeGate(probe.hookpoint, probe.hash, first, monitor=monitor, strength=config.strength, later=later)
        with self.clock.step("test prompts"):
            opens = self._opens(probe, gate)
        by = {
            kind: [p for p, one in zip(worst.mean(1), each, strict=True) if one == kind] for kind in dict.fromkeys(each)
        }
        others = [kind for kind in by if kind != "harmful"]
        over = [p - _opens_above(gate, one.prompt) for one, p in zip(self.examples, decides, strict=True)]

        def opened(kind: str = "", suite: str = "") -> Estimate:
            of = [kind == one.kind or suite == one.suite for one in self.examples]
            return alarm_rate([p for p, mine in zip(over, of, strict=True) if mine], 0)

        found = TrainedGate(
            probe=str((self.folder / "probe.safetensors").resolve()),
            spec=str((self.folder / f"{config.name}.json").resolve()) if self.spec is not None else "",
            hash=probe.hash,
            gate=gate,
            pool=probe.pool,
            model=self.lm.identity,
            sources=tuple(self.sources),
            tried=tuple(Tried(str(p), pool, f.penalty, f.auroc) for (p, pool), (f, _) in tried.items()),
            auroc={kind: auroc(by["harmful"], by[kind], config.seed) for kind in others},
            caught=opened("harmful"),
            alarms={kind: opened(kind) for kind in others},
            suites={one.suite: opened(suite=one.suite) for one in self.sources},
            points=tuple(self._operating(decides)),
            curve=tuple(calibration(fit.out_of_fold.tolist(), kinds)),
            opens=tuple(opens),
            seconds=self.clock.seconds(),
        )
        save_probe(self.folder / "probe.safetensors", replace(probe, card=_told(found, run)))
        if self.spec is not None:
            write_spec(self.folder / f"{config.name}.json", replace(self.spec, gate=gate))
        return found

    def _thresholds(self, decides: list[float]) -> tuple[float, float | None]:
        """In the first turn, and in later ones where those have their own."""
        config = self.config
        if not config.talk_alarms:
            return self._threshold("all", config.lookalike_alarms, decides), None
        if not any(one.later and one.kind == "lookalike" for one in self.examples):
            raise InputError(
                "talk_alarms is given, but no look-alike to be trained on is a later turn of a conversation; give "
                "--lookalike some, as talks-lookalike"
            )
        return (
            self._threshold("first", config.lookalike_alarms, decides),
            self._threshold("later", config.talk_alarms, decides),
        )

    def _threshold(self, turns: WhichTurns, allowed: float, decides: list[float]) -> float:
        kinds, mine = self._of_turns(turns, decides)
        return threshold_for(mine, kinds, {"benign": self.config.false_alarms, "lookalike": allowed})

    def _of_turns(self, turns: WhichTurns, decides: list[float]) -> tuple[list[Kind], list[float]]:
        found = [
            (one.kind, p)
            for one, p in zip(self.examples, decides, strict=True)
            if turns == "all" or one.later == (turns == "later")
        ]
        return [kind for kind, _ in found], [p for _, p in found]

    def _operating(self, decides: list[float]) -> Iterator[Operating]:
        parts: tuple[WhichTurns, ...] = ("first", "later") if self.config.talk_alarms else ("all",)
        for turns, allowed in product(parts, _ALLOWED):
            kinds, mine = self._of_turns(turns, decides)
            if round(allowed * kinds.count("lookalike"), 6) < 1:
                continue
            threshold = self._threshold(turns, allowed, decides)
            share: dict[str, float] = {
                kind: alarm_rate([p for p, one in zip(mine, kinds, strict=True) if one == kind], threshold).value
                for kind in dict.fromkeys(kinds)
            }
            yield Operating(allowed, turns, threshold, share.pop("harmful"), share)

    def _inputs(self, examples: Sequence[Example]) -> Inputs:
        """Of examples x system prompts, read in pieces that are kept."""
        rows = [self._row(one.prompt, system) for one in examples for system in self.config.system]
        sae = self.sae.sae if self.sae is not None and self.config.inputs == "latents" else None
        pieces: list[dict[str, Tensor]] = []
        with progress.track("prompts", len(rows), "prompts") as advance:
            for number, first in enumerate(range(0, len(rows), _CHUNK)):
                some = rows[first : first + _CHUNK]
                path = self.folder / "work" / f"inputs-{number:04d}.safetensors"
                if not path.exists():
                    made = probe_inputs(self.lm, some, self.places, self.config.pool, advance, sae)
                    path.parent.mkdir(exist_ok=True)
                    # many tokens: half of the precision, as for shards
                    kept = {f"{p} {o}": x.to(STORED) if o == "attention" else x for (p, o), x in made.at.items()}
                    with whole_file(path) as temporary:
                        save_file({**kept, "lengths": made.lengths}, temporary)
                else:
                    advance(len(some))
                pieces.append(load_file(path))
        places = product(self.places, self.config.pool)
        return Inputs(
            {(p, pool): torch.cat([piece[f"{p} {pool}"] for piece in pieces]) for p, pool in places},
            torch.cat([piece["lengths"] for piece in pieces]),
        )

    def _row(self, prompt: Prompt, system: str) -> list[int]:
        return chat_ids(self.lm, with_system(prompt, system))

    def _latents(self, x: Tensor, kinds: Sequence[Kind]) -> list[int]:
        """The latents that tell harmful prompts from look-alikes and benign ones best together; none for residuals."""
        if self.config.inputs == "residual":
            return []
        return sparse_latents(x, kinds, self.config.latents)

    def _probabilities(self, probe: Probe, prompts: Sequence[Prompt]) -> list[float]:
        """At the end of each prompt, under the first system prompt."""
        at = parse_hookpoint(probe.hookpoint)
        sae = self.sae.sae if self.sae is not None and probe.sae else None
        rows = [self._row(prompt, self.config.system[0]) for prompt in prompts]
        made = probe_inputs(self.lm, rows, [at], [probe.pool], sae=sae)
        x = made.at[at, probe.pool]
        x = x[:, list(probe.latents)] if probe.sae else x
        found: list[float] = probe.logits(x, made.lengths).sigmoid().tolist()
        return found

    def _written(self, probe: Probe, prompts: Sequence[Prompt]) -> list[float]:
        """The largest probability in the unsteered answer to each prompt."""
        rows = [self._row(prompt, self.config.system[0]) for prompt in prompts]
        answers = [answer.ids for answer in generate(self.lm, rows, _MONITOR_TOKENS)]
        sae = self.sae.sae if self.sae is not None and probe.sae else None
        return [float(p.max()) if len(p) else 0.0 for p in probabilities_written(self.lm, probe, sae, rows, answers)]

    def _monitor(self, probe: Probe) -> float:
        benign = spread([one.prompt for one in self.examples if one.kind == "benign"], _MONITORED)
        return threshold_for(self._written(probe, benign), ["benign"] * len(benign), {"benign": self.config.monitor})

    def _opens(self, probe: Probe, gate: ProbeGate) -> list[Opens]:
        found = []
        reported = reported_prompts(self.config)
        with progress.track("test prompts", sum(map(len, reported.values())), "prompts") as advance:
            for (suite, intent), prompts in reported.items():
                p = self._probabilities(probe, prompts)
                over = [one - _opens_above(gate, prompt) for one, prompt in zip(p, prompts, strict=True)]
                share = alarm_rate(over, 0)
                monitored = None
                if gate.monitor < 1:
                    shut = [prompt for prompt, one in zip(prompts, over, strict=True) if one <= 0]
                    monitored = alarm_rate(self._written(probe, shut[:_MONITORED]), gate.monitor)
                found.append(Opens(suite, intent, share, monitored))
                advance(len(prompts))
        return found


def _opens_above(gate: ProbeGate, prompt: Prompt) -> float:
    """The probability above which the gate opens at the end of a prompt."""
    return gate.later if gate.later is not None and has_answer(prompt) else gate.threshold


def sparse_latents(x: Tensor, kinds: Sequence[Kind], most: int) -> list[int]:
    """At most `most` columns of latents `x` [n, d_sae] that an L1-penalised logistic regression keeps, those of the
    largest effect first; in numerical order."""
    harmful = np.array([kind == "harmful" for kind in kinds])
    weights = np.abs(sparse_weights(x, harmful, _INVERSE_PENALTY, weights_of(kinds)))
    order = np.argsort(-weights, kind="stable")[:most]
    return sorted(int(i) for i in order if weights[i] > 0)


def _told(found: TrainedGate, run: Run) -> dict[str, Any]:
    """The card that goes with the file, wherever it goes: no path of this machine."""
    told = {key: value for key, value in to_json(found).items() if key not in ("probe", "spec", "seconds")}
    made = {key: getattr(run, key) for key in ("commit", "dirty", "versions", "started", "config_hash")}
    config = {key: value for key, value in run.config.items() if key not in ("data_dir", "spec")}
    return told | {"made": made | {"config": config}}


def _card(found: TrainedGate, run: Run) -> str:
    """The card for people."""

    def percent(one: Estimate) -> str:
        return f"{100 * one.value:.1f} % [{100 * one.low:.1f}, {100 * one.high:.1f}] of {one.n}"

    def monitored(one: Opens) -> str:
        return percent(one.monitored) if one.monitored else "not monitored"

    gate = found.gate
    what = (
        "A network of attention heads over the user's turn, on the residual"
        if found.pool == "attention"
        else "A logistic regression on the residual"
    )
    watched = f", in later turns of a conversation above {gate.later:.4f}" if gate.later is not None else ""
    watched += f", and in answers above {gate.monitor:.4f}" if gate.monitor < 1 else ""
    lines = [
        f"# Gate {found.hash}",
        "",
        f"{what} of {found.model} at `{gate.hookpoint}`, which opens above a "
        f"probability of {gate.threshold:.4f}{watched}.",
        f"Made by `demur gate train` on {run.started}, source {run.commit or 'unknown'}.",
        "",
        "Trained on (prompts that also occur in a reported suite left out):",
        "",
        "| suite | as | prompts | left out | gate opens, out of fold | hash |",
        "|---|---|--:|--:|--:|---|",
        *(
            f"| {s.suite} | {s.kind} | {s.prompts} | {s.left_out} | {percent(found.suites[s.suite])} | `{s.hash}` |"
            for s in found.sources
        ),
        "",
        "Out of fold (no prompt judged by a fit that saw it or its twin), 95 % intervals:",
        "",
        f"- harmful prompts caught: {percent(found.caught)}",
        *(f"- false alarms, {kind}: {percent(one)}" for kind, one in found.alarms.items()),
        *(f"- AUROC against {kind}: {a.value:.3f} [{a.low:.3f}, {a.high:.3f}]" for kind, a in found.auroc.items()),
        "",
        "Other thresholds:",
        "",
        "| turns | look-alikes allowed | threshold | harmful caught | look-alikes | benign |",
        "|---|--:|--:|--:|--:|--:|",
        *(
            f"| {o.turns} | {100 * o.lookalike_alarms:.0f} % | {o.threshold:.4f} | {100 * o.caught:.1f} % "
            f"| {100 * o.alarms.get('lookalike', 0):.1f} % | {100 * o.alarms.get('benign', 0):.1f} % |"
            for o in found.points
        ),
        "",
        "Calibration, out of fold, harmful prompts being half of all:",
        "",
        "| probability | mean predicted | share harmful | prompts |",
        "|---|--:|--:|--:|",
        *(f"| {b.low:.1f} to {b.high:.1f} | {b.predicted:.2f} | {b.harmful:.2f} | {b.n} |" for b in found.curve),
        "",
        "Test prompts, on which nothing was chosen, under the first system prompt:",
        "",
        "| suite | intent | gate opens | opens later, in the answer |",
        "|---|---|--:|--:|",
        *(f"| {o.suite} | {o.intent} | {percent(o.share)} | {monitored(o)} |" for o in found.opens),
        "",
    ]
    return "\n".join(lines)
