"""Controls: what a clamp does that has nothing to do with refusal.

The control latent is unrelated to refusal and about as often active as the chosen one.

What clamping it costs is the cost of steering itself (O'Brien et al., arXiv 2411.11296, use a Philosophy latent).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from demur.errors import InputError
from demur.lm.batches import Row, batches, pad, shared_length
from demur.lm.load import LanguageModel
from demur.lm.record import read
from demur.sae.base import Sae
from demur.steering.direction import Direction
from demur.types import Hookpoint


def firing_rates(lm: LanguageModel, sae: Sae, hookpoint: Hookpoint, rows: Sequence[Row]) -> Tensor:
    """Share of the tokens of `rows` (token ids) that each latent is active on.

    What all rows begin with, the system prompt mostly, is left out: it is the same few tokens every time.
    """
    shared = shared_length(rows)
    fired = torch.zeros(sae.d_sae)
    tokens = 0
    for chosen in batches([len(row) for row in rows], 16):
        padded = pad(lm, [rows[i] for i in chosen], side="right")
        residual = read(lm.model, hookpoint, padded.ids, padded.mask).residual
        counted = padded.mask.bool()
        counted[:, : max(shared, 1)] = False
        with torch.no_grad():
            fired += (sae.encode(residual[counted]) > 0).sum(0).cpu()
        tokens += int(counted.sum())
    return fired / max(tokens, 1)


def control_latent(rates: Tensor, chosen: int, related: Sequence[int], on_harmful: Tensor) -> int:
    """The latent whose firing rate on ordinary text is nearest to the chosen one's, in ratio.

    `rates` [d_sae] on harmless text; `related`: latents to leave out (all candidates); `on_harmful` [d_sae]: rates on
    harmful text, where a control must not be more active than on harmless text. Deterministic: nearest, then lowest.
    Raises `InputError` when nothing qualifies.
    """
    allowed = (rates > 0) & (on_harmful <= rates)
    allowed[list(related)] = False
    allowed[chosen] = False
    if not bool(allowed.any()):
        raise InputError("no latent can serve as a control: none outside the candidates fires on harmless text")
    target = rates[chosen].clamp(min=float(rates[rates > 0].min()))
    distance = (rates.clamp(min=1e-9).log() - target.log()).abs()
    distance[~allowed] = torch.inf
    return int(distance.argmin())


def matched_latents(
    rates: Tensor, norms: Tensor, chosen: int, related: Sequence[int], n: int, generator: torch.Generator
) -> list[int]:
    """`n` random latents like `chosen` in firing rate and decoder norm, to tell what any such latent does.

    `rates`, `norms` [d_sae]; `related`: latents to leave out. Drawn from the 4 n nearest by |log ratio| of both, added.
    Fewer where fewer fire at all.
    """
    least = rates[rates > 0].min() if bool((rates > 0).any()) else torch.tensor(1e-9)
    distance = (rates.clamp(min=1e-9) / rates[chosen].clamp(min=float(least))).log().abs()
    distance = distance + (norms.clamp(min=1e-9) / norms[chosen].clamp(min=1e-9)).log().abs()
    distance[rates <= 0] = torch.inf
    distance[[*related, chosen]] = torch.inf
    near = distance.argsort(stable=True)[: 4 * n]
    near = near[distance[near].isfinite()]
    drawn = torch.randperm(len(near), generator=generator)[:n]
    return sorted(near[drawn].tolist())


def random_direction(d_model: int, length: float, hookpoint: str, generator: torch.Generator) -> Direction:
    """A random vector of `length`: added, it moves the residual as far as a clamp of a latent does, to nowhere."""
    vector = torch.randn(d_model, generator=generator)
    return Direction(vector * (length / vector.norm()), hookpoint, "random")
