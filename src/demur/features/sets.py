"""Small sets of latents at small values, in place of one latent at a large one.

Greedy: the latent joins whose addition gains most log-odds of refusing for the damage it does, each gain counted up to
a target and damage priced at what the single latent paid (its log-odds per nat). Then the values are refined together
by gradient: least KL on benign prompts at no less than the target on harmful ones. Both look at log-odds and KL of
select prompts only; judged answers say whether the set refuses as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from demur.features.referee import Referee
from demur.lm.packed import Pack
from demur.sae.base import Sae
from demur.spec import SteeringSpec

STEPS = 12
"""Steps of refinement; each costs a forward and a backward pass over all prompts."""
RATE = 0.08
"""Of Adam, on the logarithm of the values: about 8 % a step."""
_SHORTFALL = 5.0
"""Nats of KL that a missing unit of log-odds counts as; large, so that the target is kept."""


class Grown(NamedTuple):
    """A set as it grew."""

    latents: tuple[int, ...]
    values: tuple[float, ...]
    log_odds: float
    """Mean over harmful prompts."""
    kl: float
    """Mean over benign prompts, nats per token."""


def grow(
    referee: Referee,
    make: Callable[[Sequence[int], Sequence[float]], SteeringSpec],
    pool: Sequence[int],
    value: float,
    size: int,
    target: float,
    price: float,
    advance: Callable[[float], None] = lambda amount: None,
) -> list[Grown]:
    """Sets of 1 to `size` latents of `pool`, all at `value`, each the one before with one more.

    Stops early when no latent is worth its damage. `make` gives the spec; `price`: log-odds that a nat of KL costs.
    """
    grown: list[Grown] = []
    chosen: list[int] = []
    worth = float("-inf")
    while len(chosen) < size:
        rest = [latent for latent in pool if latent not in chosen]
        tries = [make([*chosen, latent], [value] * (len(chosen) + 1)) for latent in rest]
        odds = referee.log_odds(tries).mean(1)
        kl = referee.damage(tries).kl.mean(1)
        worths = odds.clamp(max=target) - price * kl
        advance(len(tries))
        if not rest or float(worths.max()) <= worth:
            break
        best = int(worths.argmax())
        worth = float(worths[best])
        chosen.append(rest[best])
        grown.append(Grown(tuple(chosen), (value,) * len(chosen), float(odds[best]), float(kl[best])))
    return grown


def refine(
    referee: Referee,
    sae: Sae,
    latents: Sequence[int],
    values: Sequence[float],
    target: float,
    advance: Callable[[float], None] = lambda amount: None,
) -> tuple[float, ...]:
    """Values of `latents` with the least KL on benign prompts, at mean log-odds of `target` or more on harmful ones."""
    logs = torch.tensor(values, dtype=torch.float32).log().requires_grad_()
    optimiser = torch.optim.Adam([logs], lr=RATE)
    for _ in range(STEPS):
        odds, towards = _mean(referee.packs(), referee.refusal_from, sae, latents, logs)
        _, damage = _mean(referee.benign_packs(), referee.kl_from, sae, latents, logs)
        logs.grad = damage - (_SHORTFALL * towards if odds < target else 0.0)
        optimiser.step()
        advance(1)
    return tuple(logs.detach().exp().tolist())


def _mean(
    packs: Sequence[Pack],
    measure: Callable[[Pack, Tensor], Tensor],
    sae: Sae,
    latents: Sequence[int],
    logs: Tensor,
) -> tuple[float, Tensor]:
    """Mean over prompts of what `measure` gives, and its gradient; a pack at a time, so that memory holds one graph."""
    n = sum(len(one.texts) for one in packs)
    total, gradient = 0.0, torch.zeros_like(logs)
    for one in packs:
        value = measure(one, clamped(one, sae, latents, logs.exp())).sum() / n
        gradient += torch.autograd.grad(value, logs)[0]
        total += float(value.detach())
    return total, gradient


def clamped(one: Pack, sae: Sae, latents: Sequence[int], values: Tensor) -> Tensor:
    """[1, width, d_model] the residual of `one` with `latents` clamped to `values` [latents]; gradients flow."""
    residual = one.reading.residual
    with torch.no_grad():
        prepared = sae.prepare(residual[0])
        active = sae.encode_prepared(prepared.x)[:, list(latents)]
        rows = sae.W_dec[list(latents)]
    move = (values.to(rows.device) - active) @ rows
    move = move if prepared.scale is None else move * prepared.scale
    move = move * (one.positions[0] > 0).unsqueeze(-1)
    return residual + move.to(residual.dtype)
