"""What discovery looks at, and what it keeps in its run folder: the select split, the model's own refusals, effects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from demur import progress
from demur.data.prompts import prompts_hash
from demur.errors import InputError
from demur.eval.complete import Completions
from demur.eval.measurements import Measurements, Name
from demur.features.openings import Openings, find_openings, usual_refusal
from demur.features.proposers import METHODS
from demur.features.proposers.setting import Setting
from demur.features.referee import PACK, Referee
from demur.judges.rules import RulesJudge
from demur.lm.chat import chat_ids, text_ids, with_system
from demur.lm.load import LanguageModel
from demur.record import from_json, read_json, write_json
from demur.sae.base import Sae
from demur.sae.store import LoadedSae
from demur.spec import Edit, SteeringSpec
from demur.types import Completion, Hookpoint, Label, LatentRanking, Measurement, Message, Prompt
from demur.verbs.config import DiscoveryConfig
from demur.verbs.run_folder import Clock

PLAIN_READ = 12
"""Plain select prompts whose unsteered answers say what is no refusal, and on which damage is measured."""
ANSWER_TOKENS = 12
"""Tokens of those answers that damage is measured on."""
_ANY_REFUSAL = "I'm sorry, but I can't help with that."
_TOGETHER = 24
"""Specs measured between two writes to disk."""


class OwnAnswers(NamedTuple):
    """What the unsteered model says to select prompts."""

    refusals: dict[str, str]
    """By id of the harmful prompt that it refuses."""
    others: list[str]
    """Answers to harmful and plain prompts that are no refusal."""
    plain: list[Completion]
    """To the first plain prompts."""


@dataclass
class Finding:
    """A discovery in progress."""

    config: DiscoveryConfig
    folder: Path
    lm: LanguageModel
    loaded: LoadedSae
    hookpoint: Hookpoint
    harmful: list[Prompt]
    """Harmful select prompts."""
    plain: list[Prompt]
    """Plain select prompts."""
    clock: Clock
    judge: RulesJudge = field(default_factory=RulesJudge)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def completions(self) -> Completions:
        """Whole answers."""
        return Completions(self.folder / "completions.jsonl")

    @cached_property
    def short(self) -> Completions:
        """Answers cut at `screen_tokens`."""
        return Completions(self.folder / "screen.jsonl")

    @cached_property
    def measured(self) -> Measurements:
        """Effects by spec and prompt."""
        return Measurements(self.folder / "effects.jsonl")

    @property
    def saes(self) -> dict[str, Sae]:
        """The SAE by its hash."""
        return {self.loaded.hash: self.loaded.sae}

    def clamp(self, latents: int | Sequence[int], values: float | Sequence[float]) -> SteeringSpec:
        """The spec that clamps each latent to its value; a value of 0 leaves its latent alone."""
        latents = [latents] if isinstance(latents, int) else latents
        values = [values] * len(latents) if isinstance(values, int | float) else values
        pairs = [(latent, value) for latent, value in zip(latents, values, strict=True) if value]
        return SteeringSpec(tuple(Edit(str(self.hookpoint), self.loaded.hash, (i,), v) for i, v in pairs))

    def rows(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of the conversations."""
        return [chat_ids(self.lm, with_system(prompt, self.config.system)) for prompt in prompts]

    def complete(
        self,
        prompts: Sequence[Prompt],
        specs: SteeringSpec | Sequence[SteeringSpec],
        advance: Callable[[float], None] = lambda amount: None,
    ) -> list[Completion]:
        """Whole answers, under one spec or each prompt under its own."""
        return self.completions.complete(
            self.lm,
            prompts,
            specs,
            self.saes,
            self.config.system,
            self.config.max_new_tokens,
            self.config.batch_size,
            advance,
        )

    def label(self, prompt: Prompt, completion: Completion) -> Label:
        """What the judge says."""
        return self.judge.judge(prompt, completion).label

    def labels(
        self,
        prompts: Sequence[Prompt],
        specs: Sequence[SteeringSpec],
        advance: Callable[[float], None] = lambda amount: None,
        short: bool = False,
    ) -> list[list[Label]]:
        """For each of `specs` the labels of its answers to `prompts`, whole ones or cut at `screen_tokens`."""
        asked = [(spec, prompt) for spec in specs for prompt in prompts]
        completions, tokens = (
            (self.short, self.config.screen_tokens) if short else (self.completions, self.config.max_new_tokens)
        )
        said = completions.complete(
            self.lm,
            [prompt for _, prompt in asked],
            [spec for spec, _ in asked],
            self.saes,
            self.config.system,
            tokens,
            self.config.batch_size,
            advance,
        )
        found = [self.label(prompt, one) for (_, prompt), one in zip(asked, said, strict=True)]
        return [found[i * len(prompts) : (i + 1) * len(prompts)] for i in range(len(specs))]

    @cached_property
    def own(self) -> OwnAnswers:
        """What the unsteered model says by itself."""
        plain = self.plain[:PLAIN_READ]
        said = self.complete([*self.harmful, *plain], SteeringSpec())
        pairs = list(zip([*self.harmful, *plain], said, strict=True))
        labels = [self.label(prompt, completion) for prompt, completion in pairs]
        refusals = {
            prompt.id: completion.text
            for (prompt, completion), label in zip(pairs, labels, strict=True)
            if label == "refused" and prompt.intent == "harmful"
        }
        others = [completion.text for (_, completion), label in zip(pairs, labels, strict=True) if label == "complied"]
        return OwnAnswers(refusals, others, said[len(self.harmful) :])

    @cached_property
    def screened(self) -> list[Prompt]:
        """Harmful select prompts, those first that the model answers by itself: only they can change."""
        return sorted(self.harmful, key=lambda prompt: prompt.id in self.own.refusals)

    @cached_property
    def refusal(self) -> str:
        """A refusal of the archetypal prompt to read: the model's own where it refuses."""
        prompt = self._archetype
        completion = self.complete([prompt], SteeringSpec())[0]
        if self.label(prompt, completion) == "refused":
            return completion.text
        if self.config.refusal.strip():
            text, whose = self.config.refusal, "the refusal that the config gives"
        elif text := usual_refusal(list(self.own.refusals.values())):
            whose = f"its most frequent refusal of {len(self.harmful)} harmful select prompts"
        else:
            text, whose = _ANY_REFUSAL, "a usual refusal, because it refuses no harmful select prompt either"
        self.notes.append(
            "The unsteered model does not refuse the archetypal prompt by itself, so candidates were read from "
            f"{whose}: {text!r}."
        )
        return text

    @property
    def _archetype(self) -> Prompt:
        return Prompt("archetype", (Message("user", self.config.archetype),), "harmful", "study")

    @cached_property
    def openings(self) -> Openings:
        """How the model begins a refusal."""
        refusals = [text_ids(self.lm, text) for text in self.own.refusals.values()]
        others = [text_ids(self.lm, text) for text in self.own.others]
        try:
            return find_openings(refusals, others)
        except InputError:
            self.notes.append(
                "The model's own refusals do not tell how it begins one, so the log-odds of refusing are those of "
                f"{self.refusal!r} alone."
            )
            return find_openings([text_ids(self.lm, self.refusal)], [])

    def setting(self, part: slice = slice(None)) -> Setting:
        """What proposers look at, or a part of its prompts."""
        return Setting(
            self.lm,
            self.loaded,
            self.hookpoint,
            self.rows(self.screened)[part],
            self.rows(self.plain)[part],
            self.rows([self._archetype])[0],
            text_ids(self.lm, self.refusal),
            self.openings,
            self.config.select_values[0],
            self.config.contrast_at,
        )

    def prompts_hash(self) -> str:
        """Hash of the select prompts."""
        return prompts_hash([*self.harmful, *self.plain])

    def propose(self) -> list[LatentRanking]:
        """A ranking by each of the config's methods, kept in `rankings/`."""
        setting = self.setting()
        found = []
        with progress.track("methods", len(self.config.methods), "methods") as advance:
            for method in self.config.methods:
                path = self.folder / "rankings" / f"{method}.json"
                if not path.exists():
                    write_json(path, METHODS[method](setting))
                found.append(from_json(LatentRanking, read_json(path), str(path)))
                advance(1)
        return found

    @cached_property
    def referee(self) -> Referee:
        """Effects on the screened and on the first plain prompts."""
        harmful = self.rows(self.screened[: self.config.screen_prompts])
        answers = [text_ids(self.lm, one.text)[:ANSWER_TOKENS] for one in self.own.plain]
        rows = self.rows(self.plain[:PLAIN_READ])
        benign = [(row, answer) for row, answer in zip(rows, answers, strict=True) if answer]
        return Referee(self.lm, self.hookpoint, self.openings, harmful, benign, [self.loaded])

    def log_odds(self, specs: Sequence[SteeringSpec], first: int = 0, last: int | None = None) -> Tensor:
        """[specs, prompts] refusal log-odds of screened prompts `first` to `last`, measured once and kept."""
        ids = [prompt.id for prompt in self.screened[: self.config.screen_prompts][first:last]]

        def measure(some: Sequence[SteeringSpec]) -> list[tuple[Name, list[str], Tensor]]:
            return [("log_odds", ids, self.referee.log_odds(some, first, last))]

        self._fill("log-odds", specs, [("log_odds", ids)], measure)
        return self._values("log_odds", specs, ids)

    def damage(self, specs: Sequence[SteeringSpec]) -> tuple[Tensor, Tensor]:
        """Refusal log-odds and KL, both [specs, prompts], on the first plain prompts, measured once and kept."""
        ids = [p.id for p, one in zip(self.plain[:PLAIN_READ], self.own.plain, strict=True) if one.text]

        def measure(some: Sequence[SteeringSpec]) -> list[tuple[Name, list[str], Tensor]]:
            found = self.referee.damage(some)
            return [("log_odds", ids, found.log_odds), ("kl", ids, found.kl)]

        self._fill("damage", specs, [("log_odds", ids), ("kl", ids)], measure)
        return self._values("log_odds", specs, ids), self._values("kl", specs, ids)

    def _fill(
        self,
        what: str,
        specs: Sequence[SteeringSpec],
        wanted: Sequence[tuple[Name, list[str]]],
        measure: Callable[[Sequence[SteeringSpec]], list[tuple[Name, list[str], Tensor]]],
    ) -> None:
        missing = [s for s in specs if not all(self.measured.has(name, s.hash, ids) for name, ids in wanted)]
        with progress.track(what, len(missing), "specs") as advance:
            for at in range(0, len(missing), _TOGETHER):
                some = missing[at : at + _TOGETHER]
                for name, ids, values in measure(some):
                    rows = zip(some, values.tolist(), strict=True)
                    self.measured.add(
                        [Measurement(name, i, s.hash, v) for s, row in rows for i, v in zip(ids, row, strict=True)]
                    )
                advance(len(some))

    def _values(self, name: Name, specs: Sequence[SteeringSpec], ids: Sequence[str]) -> Tensor:
        return torch.tensor([self.measured.values(name, spec.hash, ids) for spec in specs], dtype=torch.float64)

    def ends(self, total: int) -> list[int]:
        """Prompts after each of two rounds over `total` prompts; the first is whole sequences of the referee."""
        first = min(-(-total // (2 * PACK)) * PACK, total)
        return sorted({first, total})
