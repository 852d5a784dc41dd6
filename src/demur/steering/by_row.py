"""Numbers kept for each row of a call over the passes of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from demur.lm.attach import Step


class ByRow:
    """Numbers remembered of each row of a call from pass to pass; rows that start afresh have `nothing`."""

    def __init__(self, nothing: float, columns: int = 1, dtype: torch.dtype = torch.float32) -> None:
        self._nothing, self._columns, self._dtype = nothing, columns, dtype
        self._kept: Tensor | None = None

    def before(self, step: Step, batch: int, device: torch.device) -> Tensor:
        """[batch, columns] what is remembered of the rows of the pass."""
        if self._kept is None or len(self._kept) != step.total:
            self._kept = torch.full((step.total, self._columns), self._nothing, dtype=self._dtype, device=device)
        elif step.fresh:  # for the rows of this pass; others may be under way
            self._kept = self._kept.index_fill(0, step.rows, self._nothing)
        return self._kept[step.rows[:batch]]

    def after(self, step: Step, values: Tensor) -> None:
        """Remember `values` [batch, columns]."""
        assert self._kept is not None
        kept = self._kept.clone()
        kept[step.rows] = step.each(values)
        self._kept = kept
