"""Which tokens of a forward pass a spec steers."""

from __future__ import annotations

import torch
from torch import Tensor

from demur.lm.attach import Step
from demur.lm.turns import ASSISTANT, TEMPLATE, USER, Memory, Turns, empty_memory, owners
from demur.spec import Positions, Where

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


class TurnReader:
    """Whose text each token is, over all passes of a call."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._memory: Memory | None = None

    def read(self, step: Step) -> Tensor:
        """Owner [batch, pos] of each token of the pass."""
        assert step.ids is not None
        memory = self._memory
        nothing = empty_memory(self._turns, step.total, step.ids.device)
        if memory is None or len(memory.last) != step.total:
            memory = nothing
        elif step.fresh:  # for the rows of this pass; others may be under way
            last, who = memory.last.clone(), memory.owner.clone()
            last[step.rows], who[step.rows] = nothing.last[step.rows], nothing.owner[step.rows]
            memory = Memory(last, who)
        rows = step.rows[: len(step.ids)]
        # padding on the left is before the first token; on the right it comes after everything that matters
        ids = step.ids.masked_fill(step.positions < 0, -1)
        owner, after = owners(self._turns, ids, Memory(memory.last[rows], memory.owner[rows]))
        last, who = memory.last.clone(), memory.owner.clone()
        last[step.rows], who[step.rows] = step.each(after.last), step.each(after.owner)
        self._memory = Memory(last, who)
        return owner
