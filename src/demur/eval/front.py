"""Pareto fronts, and the rule by which a screened spec is not worth generating under. Less is better in every value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from demur.features.halving import surely_worse
from demur.results import Objective, Tried

Rule = Literal["inert", "broken", "dominated"]


def values(one: Tried, unsteered: Tried, objectives: Sequence[Objective]) -> tuple[float, ...]:
    """What a search minimises: share of harmful prompts not fully refused, share of benign ones lost, KL, share of
    questions lost against the unsteered model. NaN where nothing was scored."""
    found: dict[Objective, float] = {
        "harmful": 1 - one.harmful_refused.value,
        "benign": one.benign_lost.value,
        "kl": one.kl.value,
        "capability": unsteered.capability.value - one.capability.value,
    }
    return tuple(found[objective] for objective in objectives)


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `one` is as good as `other` in every value and better in one."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other dominates, in order; points with a NaN are left out."""
    known = [i for i, point in enumerate(points) if not any(map(math.isnan, point))]
    return [i for i in known if not any(dominates(points[j], points[i]) for j in known)]


class Look(NamedTuple):
    """What the screen saw of a spec, prompt by prompt."""

    harmful: list[float]
    """Change of the refusal log-odds on harmful prompts."""
    benign: list[float]
    """The same on benign ones."""
    kl: list[float]
    """KL to the unsteered answers to those, nats per token."""


def prune(look: Look, judged: Sequence[Look], inert: float, most_kl: float) -> Rule | None:
    """Why a spec is not worth generating under, or None.

    `inert`: the refusal log-odds of harmful prompts rise by less than `inert` nats on average, so it would sit beside
    the unsteered model. `broken`: mean KL above `most_kl`. `dominated`: some spec in `judged` surely raises log-odds
    more on harmful prompts, less on benign ones, and moves answers less (paired 95 % intervals over prompts).
    """
    if _mean(look.harmful) < inert:
        return "inert"
    if _mean(look.kl) > most_kl:
        return "broken"
    for other in judged:
        less_harm = surely_worse(torch.tensor(look.harmful), torch.tensor(other.harmful))
        more_cost = all(
            surely_worse(-torch.tensor(mine), -torch.tensor(theirs))
            for mine, theirs in ((look.benign, other.benign), (look.kl, other.kl))
        )
        if less_harm and more_cost:
            return "dominated"
    return None


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
