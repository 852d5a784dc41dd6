"""The causal referee: what specs do to refusal and to harmless answers, measured under the intervention itself.

Effect on refusal: the change of the log-odds that the answer begins with one of the model's own refusals
(`demur.features.openings`). Damage: KL(unsteered || steered) in nats per token over the unsteered answers to benign
prompts. Everything below the steered block is the same for every spec, so it is computed once; prompts share their
system prompt and lie side by side in one sequence (`demur.lm.packed`), specs are the rows of a batch. No text is
generated: the referee ranks many specs cheaply, and judged generations decide between the few that are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from demur.errors import InputError
from demur.features.openings import Openings
from demur.features.reach import Gates
from demur.lm.batches import Row
from demur.lm.load import LanguageModel
from demur.lm.packed import Pack, Text, log_probs, pack
from demur.sae.store import LoadedSae
from demur.spec import SteeringSpec
from demur.steering.artefacts import Artefacts
from demur.steering.direction import Direction
from demur.steering.edits_at import edits_at
from demur.steering.layer import apply
from demur.steering.vectors import Vector
from demur.types import Hookpoint, parse_hookpoint

_TOGETHER = 1_024
"""Tokens in a forward pass, roughly: more specs together are no faster on two cores, and take memory."""
PACK = 4
"""Prompts in one sequence. Attention looks at all pairs of its tokens, so longer is not faster."""


class Damage(NamedTuple):
    """What specs do to benign prompts."""

    log_odds: Tensor
    """[specs, prompts] that the answer begins as a refusal."""
    kl: Tensor
    """[specs, prompts] nats per token of the unsteered answer."""


class Referee:
    """Effects of specs that edit at `hookpoint`, on fixed prompts.

    Positions may be any that do not depend on whose text a token is, a gate one that looks at the last token of the
    prompt (`demur.features.reach`).

    `harmful`: token ids of prompts. `benign`: of prompts with the unsteered model's answers, in whole or in part.
    """

    def __init__(
        self,
        lm: LanguageModel,
        hookpoint: Hookpoint,
        openings: Openings,
        harmful: Sequence[Row],
        benign: Sequence[tuple[Row, Row]] = (),
        saes: Sequence[LoadedSae] = (),
        directions: Sequence[Vector] = (),
    ) -> None:
        self.lm, self.hookpoint, self.openings = lm, hookpoint, openings
        self._found = Artefacts(lm.model, saes, directions, {})
        self._gates = Gates(lm, self._found)
        branches = openings.branches
        self._harmful = _packs(lm, hookpoint, [Text(row, branches) for row in harmful])
        self._benign = _packs(lm, hookpoint, [Text(row, (*branches, answer[:-1])) for row, answer in benign])
        self._base: dict[int, Tensor] = {}

    def add(self, direction: Direction) -> None:
        """Let specs name `direction` too."""
        self._found.add(direction)

    @property
    def n_harmful(self) -> int:
        """Harmful prompts."""
        return sum(len(one.texts) for one in self._harmful)

    @property
    def n_benign(self) -> int:
        """Benign prompts."""
        return sum(len(one.texts) for one in self._benign)

    def packs(self) -> Sequence[Pack]:
        """The harmful prompts as they are run, for whoever needs gradients."""
        return self._harmful

    def benign_packs(self) -> Sequence[Pack]:
        """The benign prompts likewise."""
        return self._benign

    def refusal_from(self, one: Pack, residual: Tensor) -> Tensor:
        """[n, prompts] refusal log-odds of the prompts of `one` when the hookpoint gives `residual`."""
        return self._refusal(one, log_probs(self.lm, one, residual))

    def kl_from(self, one: Pack, residual: Tensor) -> Tensor:
        """[n, prompts] KL likewise, of one of `benign_packs`."""
        return self._kl(one, log_probs(self.lm, one, residual))

    def log_odds(self, specs: Sequence[SteeringSpec], first: int = 0, last: int | None = None) -> Tensor:
        """[specs, prompts] log-odds that the answer to harmful prompts `first` to `last` begins as a refusal.

        `first` and `last` fall between sequences, that is, are multiples of `PACK` or the end.
        """
        chosen = _between(self._harmful, first, last)
        rows = []
        for some in self._batches(specs, chosen):
            parts = [self._refusal(one, log_probs(self.lm, one, self.edited(one, some))) for one in chosen]
            rows.append(torch.cat(parts, 1))
        return torch.cat(rows)

    def output_scores(self, specs: Sequence[SteeringSpec]) -> Tensor:
        """[specs] largest (1 - rank / vocabulary) x probability of any opening on the first harmful prompt: see
        `proposers.output_score`."""
        one = self._harmful[0]
        found = []
        for some in self._batches(specs, [one]):
            answers = one.of_answers(log_probs(self.lm, one, self.edited(one, some)))[0]
            found.append(self.openings.output_scores(answers))
        return torch.cat(found)

    def damage(self, specs: Sequence[SteeringSpec], first: int = 0, last: int | None = None) -> Damage:
        """What `specs` do to benign prompts `first` to `last`, as in `log_odds`."""
        chosen = _between(self._benign, first, last)
        found = []
        for some in self._batches(specs, chosen):
            parts = []
            for one in chosen:
                scored = log_probs(self.lm, one, self.edited(one, some))
                parts.append((self._refusal(one, scored), self._kl(one, scored)))
            found.append([torch.cat(part, 1) for part in zip(*parts, strict=True)])
        return Damage(*(torch.cat(part) for part in zip(*found, strict=True)))

    def edited(self, one: Pack, specs: Sequence[SteeringSpec]) -> Tensor:
        """[specs, width, d_model] the residual of `one` under each spec."""
        for spec in specs:
            if spec.mode != "error_preserving":
                raise InputError(f"the referee does not measure the mode {spec.mode}; use error_preserving")
            for edit in spec.edits:
                if parse_hookpoint(edit.hookpoint) != self.hookpoint:
                    raise InputError(f"the referee reads {self.hookpoint}, but an edit is at {edit.hookpoint}")
        groups = edits_at(self.hookpoint, specs, self._found)
        residual = one.reading.residual
        n, (_, width, d_model) = len(specs), residual.shape
        x = residual.expand(n, -1, -1).reshape(-1, d_model)
        device = x.device
        which = torch.arange(n, device=device).repeat_interleave(width)
        on, strength = self._gates.reach(one, specs)
        with torch.no_grad():
            if groups:
                x = x.to(groups[0].rows.dtype)
                far = None if strength is None else strength.to(x.dtype).reshape(-1, 1)
                found = apply(groups, x, which, on.reshape(-1, 1), strength=far)
            else:
                found = x
        return found.to(residual.dtype).view(n, width, d_model)

    def _batches(self, specs: Sequence[SteeringSpec], chosen: Sequence[Pack]) -> Iterator[Sequence[SteeringSpec]]:
        if not chosen:
            raise InputError("no prompt was given to measure effects on")
        if not specs:
            raise InputError("no spec was given to measure the effect of; give one or more")
        size = max(1, _TOGETHER // max(one.ids.shape[1] for one in chosen))
        yield from (specs[i : i + size] for i in range(0, len(specs), size))

    def _refusal(self, one: Pack, scored: Tensor) -> Tensor:
        n = len(self.openings.branches)
        return torch.stack([self.openings.log_odds(answers[:n]) for answers in one.of_answers(scored)], dim=1)

    def _kl(self, one: Pack, scored: Tensor) -> Tensor:
        key = id(one)
        if key not in self._base:
            self._base[key] = log_probs(self.lm, one, one.reading.residual)
        found = []
        for before, after in zip(one.of_answers(self._base[key]), one.of_answers(scored), strict=True):
            base, steered = before[-1], after[-1]
            kl = torch.nn.functional.kl_div(steered, base.expand_as(steered), reduction="none", log_target=True)
            found.append(kl.sum(-1).double().mean(-1))
        return torch.stack(found, dim=1)


def _packs(lm: LanguageModel, hookpoint: Hookpoint, texts: Sequence[Text]) -> list[Pack]:
    return [pack(lm, hookpoint, texts[i : i + PACK]) for i in range(0, len(texts), PACK)]


def _between(packs: Sequence[Pack], first: int, last: int | None) -> Sequence[Pack]:
    end = len(packs) if last is None else -(-last // PACK)
    return packs[first // PACK : end]
