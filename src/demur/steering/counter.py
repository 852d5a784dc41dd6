"""Counts of what steering did: by row of the batch and by edited latent or direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from demur.lm.attach import Step


class Move(NamedTuple):
    """What some edits add to residuals."""

    delta: Tensor
    """[n, d_model]"""
    acts: Tensor
    """[n, slots] bool: the edit of this latent or direction was in force."""
    norms: Tensor
    """[n, slots] how far it moved the residual."""


class Slot(NamedTuple):
    """One edited latent or direction at one hookpoint, and what happened to it in each row of the batch."""

    name: str
    """`latent 12 of HASH`, or `direction HASH, add`."""
    hookpoint: str
    steered: list[int]
    """Tokens on which an edit of it was in force."""
    changed: list[int]
    """Tokens whose residual it moved."""
    mean_norm: list[float]
    """Mean norm of those moves; 0 where there was none."""


class Counter:
    """Sums on the device, so that counting waits for nothing."""

    def __init__(self, names: Sequence[str], hookpoint: str) -> None:
        self._names, self._hookpoint = list(names), hookpoint
        self._sums: Tensor | None = None

    def add(self, move: Move, batch: int, step: Step) -> None:
        """Count the moves of one pass over `batch` rows of equal length."""
        acts, norms = move.acts, move.norms.detach()
        sums = torch.stack([acts, norms > 0, norms]).view(3, batch, -1, len(self._names)).sum(2, dtype=torch.float64)
        if self._sums is None or self._sums.shape[1] < step.given:
            grown = sums.new_zeros(3, step.given, len(self._names))
            if self._sums is not None:
                grown[:, : self._sums.shape[1]] = self._sums
            self._sums = grown
        # where one row stands for all (a shared prefix), each of them was steered in it
        self._sums.index_add_(1, step.origin.to(sums.device), sums.expand(3, len(step.origin), -1))

    def slots(self) -> list[Slot]:
        """What was counted."""
        if self._sums is None:
            return [Slot(name, self._hookpoint, [], [], []) for name in self._names]
        steered, changed, moved = self._sums.cpu()
        mean = moved / changed.clamp(min=1)
        return [
            Slot(
                name,
                self._hookpoint,
                steered[:, i].long().tolist(),
                changed[:, i].long().tolist(),
                mean[:, i].tolist(),
            )
            for i, name in enumerate(self._names)
        ]
