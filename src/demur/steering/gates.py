"""Gates: whether a row is steered at all, decided token by token from what has been read so far.

A gate is causal (a token's decision looks at no later token), keeps its state over the passes of one call, and
starts afresh with an empty cache; so cached, uncached, chunked and batched passes decide alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from demur.lm.attach import Step
from demur.sae.base import Sae
from demur.spec import LatentGate

Fires = Callable[[Tensor, Step], Tensor]
"""Residual [batch, pos, d_model] at the gate's hookpoint and step to bool [batch, pos]: does this token open the gate?
Must judge each token by itself and earlier ones; padding and other positions are left out by demur."""


def latent_exceeds(gate: LatentGate, sae: Sae, exact: bool) -> Fires:
    """Fires where the gate's latent exceeds its threshold."""
    reader = sae.reader([gate.latent], exact)
    threshold = sae.in_units([gate.latent], gate.threshold, gate.unit)

    def fires(residual: Tensor, step: Step) -> Tensor:
        x = sae.prepare(residual).x.flatten(0, -2)
        wanted = (step.positions.to(x.device) >= 0).reshape(-1, 1)
        return (reader(x, wanted) > threshold).view(residual.shape[:-1])

    return fires


class GateState:
    """Which rows a gate has opened for, over all passes of a call."""

    def __init__(self, fires: Fires) -> None:
        self._fires = fires
        self._open: Tensor | None = None

    def read(self, residual: Tensor, step: Step, at: Tensor) -> Tensor:
        """[batch, pos] bool: open at each token. `at` [batch, pos]: tokens that the gate looks at."""
        fired = self._fires(residual, step).to(at.device) & at
        if self._open is None or len(self._open) != step.total:
            self._open = torch.zeros(step.total, dtype=torch.bool, device=at.device)
        elif step.fresh:  # for the rows of this pass; others may be under way
            self._open = self._open.index_fill(0, step.rows, False)
        before = self._open[step.rows[: len(at)]].unsqueeze(1)
        opened = (fired.long().cummax(dim=1).values > 0) | before
        after = self._open.clone()
        after[step.rows] = step.each(opened[:, -1])
        self._open = after
        return opened
