"""Gates: whether, and how far, a row is steered, decided token by token from what has been read so far.

A gate is causal (a token's decision looks at no later token), keeps its state over the passes of one call, and
starts afresh with an empty cache; so cached, uncached, chunked and batched passes decide alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from demur.lm.attach import Step
from demur.lm.turns import ASSISTANT, TEMPLATE, USER
from demur.sae.base import Sae
from demur.spec import LatentGate
from demur.steering.by_row import ByRow
from demur.steering.probe import Probe

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


class Probability:
    """A probe's probability at each token, over all passes of a call."""

    def __init__(self, probe: Probe, sae: Sae | None, exact: bool, device: torch.device) -> None:
        self._probe, self._sae = probe, sae
        self._weight = probe.weight.to(device)
        self._attention = probe.attention.to(device) if probe.attention is not None else None
        self._reader = sae.reader(list(probe.latents), exact) if sae is not None else None
        self.pools = probe.pool != "token"
        """Needs to know whose text each token is."""
        self._heads = 1 if probe.attention is None else probe.weight.shape[1]
        # sums over a long conversation, of which an early part is taken off again: double precision
        self._kept = ByRow(0.0, 2 * self._heads + 2, torch.float64)

    def read(self, residual: Tensor, step: Step, owner: Tensor | None) -> Tensor:
        """[batch, pos] float32. `owner` [batch, pos]: whose text each token is, where the probe `pools`."""
        if not self.pools:
            return self._logits(residual, step).sigmoid()
        assert owner is not None
        if self._attention is not None:
            said, counts = self._attention(residual, self._weight)
            logits = self._pooled(said, counts, step, owner.to(said.device)) + self._probe.bias
        else:
            said = self._logits(residual, step).unsqueeze(-1)
            logits = self._pooled(said, torch.ones_like(said), step, owner.to(said.device))
        return logits.sigmoid()

    def _logits(self, residual: Tensor, step: Step) -> Tensor:
        if self._sae is None or self._reader is None:
            return residual.float() @ self._weight + self._probe.bias
        x = self._sae.prepare(residual).x.flatten(0, -2)
        wanted = (step.positions.to(x.device) >= 0).reshape(-1, 1).expand(-1, len(self._weight))
        return (self._reader(x, wanted).float() @ self._weight + self._probe.bias).view(residual.shape[:-1])

    def _pooled(self, said: Tensor, counts: Tensor, step: Step, owner: Tensor) -> Tensor:
        """[batch, pos]: of each head the mean of what is `said` [batch, pos, heads], each token weighing what it
        `counts`, over the current turn's text up to each token; summed over heads. -inf where there is none.

        Text before any turn, as of a row that is no conversation, is a turn of its own; its first token, which is an
        attention sink, does not count. A template's tokens belong to the turn before them.
        """
        kept = self._kept.before(step, len(said), said.device).unsqueeze(1)
        sums, (whose, before) = kept[..., :-2].unflatten(-1, (2, -1)), kept[..., -2:].unbind(-1)
        text = step.positions.to(owner.device) >= 0
        spoken = ((owner == USER) | (owner == ASSISTANT)) & text
        places = torch.arange(owner.shape[1], device=owner.device).expand_as(owner)
        latest = torch.where(spoken, places, -1).cummax(1).values
        # whose turn each token belongs to: TEMPLATE before any
        turn = torch.where(latest >= 0, owner.gather(1, latest.clamp(min=0)), whose.long())
        # padding may stand in the middle of a row, after a beginning that several share: it changes nothing
        known = torch.where(text, owner, before.long())
        starts = spoken & (owner != torch.cat([before.long(), known[:, :-1]], 1))
        counted = torch.where(turn == TEMPLATE, (owner == TEMPLATE) & (step.positions.to(owner.device) > 0), spoken)
        own = torch.stack([said * counts, counts], -2).double().masked_fill(~counted[..., None, None], 0.0)
        total = own.cumsum(1) + sums
        # what stood before the latest start is not of this turn
        start = torch.where(starts, places, -1).cummax(1).values
        before_it = (total - own).gather(1, start.clamp(min=0)[..., None, None].expand_as(own))
        total = total - torch.where((start >= 0)[..., None, None], before_it, 0.0)
        self._kept.after(step, torch.cat([total[:, -1].flatten(1), torch.stack([turn, known], -1)[:, -1]], 1))
        mean = torch.where(total[..., 1, :] > 0, total[..., 0, :] / total[..., 1, :], -torch.inf)
        return mean.sum(-1).float()


class GateState:
    """How far a gate has opened for each row, over all passes of a call: from 0, shut, to 1."""

    def __init__(self) -> None:
        self._kept = ByRow(0.0)

    def now(self, step: Step) -> Tensor:
        """[batch, 1] float32: open before the tokens of the pass."""
        return self._kept.before(step, len(step.positions), step.positions.device)

    def read(self, fired: Tensor, step: Step) -> Tensor:
        """[batch, pos] float32: open at each token. `fired` [batch, pos]: how far it would open there by itself."""
        before = self._kept.before(step, len(fired), fired.device)
        opened = torch.maximum(fired.float().cummax(dim=1).values, before)
        self._kept.after(step, opened[:, -1:])
        return opened
