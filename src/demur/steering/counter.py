"""Counts of what steering did: by row of the batch and by edited latent or direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from demur.lm.attach import Step
from demur.steering.layer import Move


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


_PENDING = 1 << 20
"""Numbers kept before they are summed up: summing after every token would cost more than steering it."""


class Counter:
    """Sums on the device, so that counting waits for nothing."""

    def __init__(self, names: Sequence[str], hookpoint: str, rows: Tensor) -> None:
        self._names, self._hookpoint, self._rows = list(names), hookpoint, rows
        self._waiting: list[tuple[Move, Step]] = []
        self._size = 0
        self._sums: Tensor | None = None
        self._given = 0

    def none(self, step: Step) -> None:
        """Count that nothing was in force in a pass."""
        self._given = max(self._given, step.given)

    def add(self, move: Move, step: Step) -> None:
        """Count the moves of one pass."""
        self._waiting.append((move, step))
        self._size += move.sizes.numel()
        if self._size > _PENDING:
            self._sum_up()

    def _sum_up(self) -> None:
        norms = self._rows.norm(dim=1)
        for (acts, sizes), step in self._waiting:
            moved = sizes.detach().abs() * norms
            shape = (3, len(step.positions), -1, len(self._names))
            sums = torch.stack([acts, moved > 0, moved]).view(shape).sum(2, dtype=torch.float64)
            self._sums = self._for(step.given, sums.device)
            # where a row stands for several (a shared prefix), each of them was steered in it
            self._sums.index_add_(1, step.origin.to(sums.device), step.each(sums, 1))
        self._waiting, self._size = [], 0

    def _for(self, rows: int, device: torch.device) -> Tensor:
        """[3, rows or more, slots] the sums so far."""
        have = 0 if self._sums is None else self._sums.shape[1]
        if self._sums is not None and have >= rows:
            return self._sums
        grown = torch.zeros(3, rows, len(self._names), dtype=torch.float64, device=device)
        if self._sums is not None:
            grown[:, :have] = self._sums
        return grown

    def forget(self, row: int) -> None:
        """Count `row` from nothing again."""
        self._sum_up()
        if self._sums is not None and row < self._sums.shape[1]:
            self._sums[:, row] = 0

    def slots(self) -> list[Slot]:
        """What was counted."""
        self._sum_up()
        self._sums = self._for(self._given, self._rows.device)
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
