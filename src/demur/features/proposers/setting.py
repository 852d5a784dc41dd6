"""What every proposer looks at: a model, an SAE, and prompts of the select split, with what is read of them once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from demur.features.openings import Openings
from demur.lm.batches import Row, batches, pad, shared_length
from demur.lm.load import LanguageModel
from demur.lm.record import read
from demur.sae.store import LoadedSae
from demur.types import Hookpoint, LatentRanking, LatentScore, stable_hash

Where = Literal["last", "prompt"]
"""Tokens that contrasts look at: the last of the prompt, or all that prompts do not begin with in common."""


@dataclass(frozen=True)
class Setting:
    """One question: which latents mediate refusal here?"""

    lm: LanguageModel
    loaded: LoadedSae
    hookpoint: Hookpoint
    harmful: Sequence[Row]
    """Token ids of harmful prompts up to where the answer begins."""
    benign: Sequence[Row]
    """Of plain harmless prompts."""
    archetype: Row
    """Of the archetypal prompt."""
    refusal: Row
    """Token ids of a refusal of it."""
    openings: Openings
    value: float
    """Clamp value, in latent units, for proposers that try latents."""
    where: Where = "last"

    @cached_property
    def harmful_latents(self) -> Tensor:
        """[prompts, d_sae] activations of harmful prompts, the mean over the tokens that `where` names."""
        return self._over_tokens(self.harmful, lambda x: self.loaded.sae.encode(x).mean(0))

    @cached_property
    def benign_latents(self) -> Tensor:
        """[prompts, d_sae] the same of benign prompts."""
        return self._over_tokens(self.benign, lambda x: self.loaded.sae.encode(x).mean(0))

    @cached_property
    def harmful_residuals(self) -> Tensor:
        """[prompts, d_model] mean residuals of harmful prompts over the same tokens."""
        return self._over_tokens(self.harmful, lambda x: x.float().mean(0))

    @cached_property
    def benign_residuals(self) -> Tensor:
        """[prompts, d_model] of benign prompts."""
        return self._over_tokens(self.benign, lambda x: x.float().mean(0))

    @cached_property
    def _residuals(self) -> dict[int, list[Tensor]]:
        return {}

    def _over_tokens(self, rows: Sequence[Row], of: Callable[[Tensor], Tensor]) -> Tensor:
        if id(rows) not in self._residuals:
            self._residuals[id(rows)] = self._read(rows)
        with torch.no_grad():
            return torch.stack([of(x) for x in self._residuals[id(rows)]])

    def _read(self, rows: Sequence[Row]) -> list[Tensor]:
        shared = shared_length([*self.harmful, *self.benign])
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for batch in batches([len(row) for row in rows], 16):
            padded = pad(self.lm, [rows[i] for i in batch], side="right")
            residual = read(self.lm.model, self.hookpoint, padded.ids, padded.mask).residual
            for place, i in enumerate(batch):
                last = len(rows[i]) - 1
                first = last if self.where == "last" else min(max(shared, 1), last)
                found[i] = residual[place, first : len(rows[i])]
        return found

    def ranking(
        self, method: str, scores: Tensor, details: dict[str, Tensor] | None = None, keep: Sequence[int] | None = None
    ) -> LatentRanking:
        """The latents by `scores` [d_sae], largest first, lowest number first among equals; `keep`: only those."""
        kept = torch.as_tensor(range(len(scores)) if keep is None else sorted(keep))
        chosen = scores[kept.to(scores.device)].double().cpu()
        order = kept[chosen.argsort(descending=True, stable=True)].tolist()
        columns = {name: value.double().cpu().tolist() for name, value in (details or {}).items()}
        values = scores.double().cpu().tolist()
        found = [LatentScore(i, values[i], {name: column[i] for name, column in columns.items()}) for i in order]
        seen = stable_hash([[list(map(int, row)) for row in rows] for rows in (self.harmful, self.benign)])
        return LatentRanking(method, str(self.hookpoint), self.loaded.hash, seen, tuple(found))
