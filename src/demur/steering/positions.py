"""Which tokens of a forward pass a spec steers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from demur.lm.attach import Step
from demur.lm.turns import ASSISTANT, TEMPLATE, USER, Memory, Turns, owners
from demur.spec import Positions, Where
from demur.steering.by_row import ByRow

OWNERS: dict[Where, int] = {"user": USER, "assistant": ASSISTANT, "template": TEMPLATE}
"""Positions that depend on whose text a token is."""


def chosen(positions: Positions, step: Step, owner: Tensor | None = None) -> Tensor:
    """[batch, pos] bool: tokens that `positions` names; padding never. `owner` as `TurnReader` gives it."""
    at, prompt = step.positions, step.prompt_lengths.unsqueeze(1)
    where = positions.where
    start = torch.zeros_like(prompt)
    if where == "all":
        found = at >= 0
    elif where == "prompt":
        found = (at >= 0) & (at < prompt)
    elif where == "last_prompt_token":
        found = at == prompt - 1
    elif where in ("generation", "answer"):
        start = _first(positions, step)
        found = at >= start
        if positions.first:
            found &= at < start + positions.first
    else:
        assert owner is not None
        found = (at >= 0) & (owner == OWNERS[where])
    return found & ((at - start) % positions.every == 0) if positions.every > 1 else found


def strength(positions: Positions, step: Step) -> Tensor:
    """[batch, pos] the share of their way that edits go at each token: less and less where there is a half-life."""
    if not positions.half_life:
        return torch.ones_like(step.positions, dtype=torch.float32)
    number = (step.positions - _first(positions, step)).clamp(min=0)
    return torch.pow(0.5, number.float() / positions.half_life)


def _first(positions: Positions, step: Step) -> Tensor:
    """[batch, 1] where counting begins: the first written token, or the one whose output that is."""
    return step.prompt_lengths.unsqueeze(1) - int(positions.where == "answer")


class Read(NamedTuple):
    """What turns say of the tokens of a pass."""

    owner: Tensor
    """[batch, pos] whose text each token is."""
    spoken: Tensor
    """[batch, pos] bool: it is the assistant's, or one before it was."""


class TurnReader:
    """Whose text each token is, over all passes of a call."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._last = ByRow(-1, turns.longest - 1, torch.long)
        self._owner = ByRow(TEMPLATE, dtype=torch.long)
        self._spoken = ByRow(False, dtype=torch.bool)
        self._unread: list[Tensor] = []
        self._step: Step | None = None

    def put_off(self, ids: Tensor) -> None:
        """Read `ids` [batch, pos], with which the rows of the last pass go on, only when something else is read."""
        self._unread.append(ids.clone())  # not a view of a longer text, nor of a buffer that is written again

    def read(self, step: Step) -> Read:
        """Of each token of the pass."""
        if self._unread:
            assert self._step is not None
            ids = torch.cat(self._unread, 1)
            self._unread = []
            self._read(self._step._replace(ids=ids, positions=torch.zeros_like(ids), fresh=False))
        self._step = step
        return self._read(step)

    def _read(self, step: Step) -> Read:
        assert step.ids is not None
        batch, device = len(step.ids), step.ids.device
        memory = Memory(self._last.before(step, batch, device), self._owner.before(step, batch, device).squeeze(1))
        # padding on the left is before the first token; on the right it comes after everything that matters
        ids = step.ids.masked_fill(step.positions < 0, -1)
        owner, after = owners(self._turns, ids, memory)
        spoken = (owner == ASSISTANT).cummax(1).values | self._spoken.before(step, batch, device)
        self._last.after(step, after.last)
        self._owner.after(step, after.owner.unsqueeze(1))
        self._spoken.after(step, spoken[:, -1:])
        return Read(owner, spoken)
