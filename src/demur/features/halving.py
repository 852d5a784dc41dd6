"""Successive halving with paired intervals: the best of many arms without trying all of them on every prompt.

Every arm is measured on the same few prompts, the better share goes on to more (Jamieson and Talwalkar, AISTATS 2016).
Between rounds an arm also leaves if it is surely worse than the worst that may stay: the 95 % interval of the paired
difference (Student's t) lies below zero. Arms are compared by means over prompts; a mean says nothing about prompts of
other kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from scipy.stats import t as student_t
from torch import Tensor

Arm = TypeVar("Arm")
ETA = 2
"""One in so many arms stays after each round."""
_FEW = 4
"""Prompts below which no arm leaves on account of its interval."""


class Standing(NamedTuple, Generic[Arm]):
    """How far one arm came."""

    arm: Arm
    values: Tensor
    """[prompts] what was measured; NaN where a prompt could not be scored."""

    @property
    def mean(self) -> float:
        """Mean over the prompts that were scored; -inf without any."""
        scored = self.values[~self.values.isnan()]
        return float(scored.mean()) if len(scored) else float("-inf")


def halve(
    arms: Sequence[Arm],
    measure: Callable[[Sequence[Arm], int, int], Tensor],
    ends: Sequence[int],
    keep: int,
) -> list[Standing[Arm]]:
    """All arms, best first: those that came further before the others, the earlier given among equals.

    `measure(arms, first, last)` gives [arms, last - first], larger is better, on prompts `first` to `last`. `ends`: up
    to which prompt each round measures. After every round but the last the best 1 / ETA stay, `keep` at least; when no
    more than `keep` are left before the last round, they still get all prompts.
    """
    left = [Standing(arm, torch.empty(0, dtype=torch.float64)) for arm in arms]
    gone: list[Standing[Arm]] = []
    first = 0
    for number, last in enumerate(ends):
        new = measure([one.arm for one in left], first, last).double().cpu()
        left = [Standing(one.arm, torch.cat([one.values, row])) for one, row in zip(left, new, strict=True)]
        left.sort(key=lambda one: -one.mean)
        first = last
        if number < len(ends) - 1:
            stay = max(keep, -(-len(left) // ETA))
            bar = left[min(keep, len(left)) - 1]
            kept = [one for place, one in enumerate(left) if place < stay and not surely_worse(one.values, bar.values)]
            gone = [one for one in left if not any(one is other for other in kept)] + gone
            left = kept
    return left + gone


def surely_worse(values: Tensor, other: Tensor) -> bool:
    """Whether the 95 % interval of the paired difference `values` - `other` [prompts] lies below zero."""
    difference = (values - other)[~(values - other).isnan()]
    if len(difference) < _FEW:
        return False
    n = len(difference)
    half = float(student_t.ppf(0.975, n - 1)) * float(difference.std()) / n**0.5
    return bool(float(difference.mean()) + half < 0)
