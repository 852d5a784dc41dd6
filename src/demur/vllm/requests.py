"""The requests of a worker: which row each has, and, step by step, what is to happen to each of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch

from demur.lm.attach import Step
from demur.spec import SteeringSpec
from demur.steering.positions import chosen
from demur.vllm.buffers import Buffers, Ints
from demur.vllm.table import UNSTEERED_NUMBER, Table


class Requests:
    """At most `rows` steered requests at a time."""

    def __init__(self, table: Table, buffers: Buffers, rows: int) -> None:
        self._table, self._buffers = table, buffers
        self._trash = rows
        self._rows: dict[str, int] = {}
        self._free = list(range(rows))
        self._number = np.zeros(rows + 1, dtype=np.int64)
        self.steered = np.zeros(len(table.labels), dtype=np.int64)
        """[labels] tokens edited under specs without a gate."""
        self.gated = np.zeros(len(table.labels), dtype=np.int64)
        """[labels] requests under specs with a gate."""

    def leave(self, ids: Collection[str]) -> None:
        """These requests are over, or start from their first token again."""
        for one in ids:
            row = self._rows.pop(one, self._trash)
            if row != self._trash:
                self._table.release(int(self._number[row]))
                self._number[row] = UNSTEERED_NUMBER
                self._free.append(row)

    def keep(self, ids: Collection[str]) -> None:
        """All others are over."""
        self.leave([one for one in self._rows if one not in ids])

    def step(
        self, ids: Sequence[str], scheduled: Ints, computed: Ints, prompts: Ints, spec_of: Callable[[str], SteeringSpec]
    ) -> None:
        """Fill the buffers for a step with `scheduled` tokens [n] of each request, in this order, after `computed` [n].

        `prompts` [n]: tokens of each prompt. `spec_of` gives the spec of a request that is new here.
        """
        for place, one in enumerate(ids):
            if one not in self._rows:
                self._enter(one, spec_of(one), int(computed[place]))
        rows: Ints = np.fromiter((self._rows[one] for one in ids), dtype=np.int64, count=len(ids))
        if bool((rows == self._trash).all()):
            if not self._buffers.idle:
                self._buffers.clear()
            return
        starts = np.cumsum(scheduled) - scheduled
        row, first = np.repeat(rows, scheduled), np.repeat(starts, scheduled)
        at = np.arange(len(row)) - first + np.repeat(computed, scheduled)
        who = self._number[row]
        prompt = np.repeat(prompts, scheduled)
        spec = self._where(self._table.edits_kind[who], at, prompt, who)
        look = self._where(self._table.looks_kind[who], at, prompt, who)
        watched = self._table.monitors[who] & (at >= prompt)
        look[watched] = who[watched] + self._table.monitor
        self._buffers.fill(spec, who, look, row, first)
        self._mark(spec, look, who)
        plain = spec[(spec > 0) & (self._table.looks_kind[spec] < 0)]
        if len(plain):
            self.steered += np.bincount(self._table.label[plain], minlength=len(self.steered))

    def _enter(self, one: str, spec: SteeringSpec, computed: int) -> None:
        if not spec.edits:
            self._rows[one] = self._trash
            return
        number = self._table.use(spec)
        row = self._free.pop()
        self._rows[one], self._number[row] = row, number
        self._buffers.label[row] = int(self._table.label[number])
        self._buffers.gate_open[row] = 0
        if self._table.gated(number):
            # what a gate has seen is known to nobody else, so its request may not start in the middle
            assert computed == 0, "a request with a gate was given tokens from the prefix cache"
            self.gated[self._table.label[number]] += 1

    def _where(self, kind: Ints, at: Ints, prompt: Ints, who: Ints) -> Ints:
        """[tokens] `who` where the positions of `kind` name the token, else 0."""
        found = np.zeros_like(who)
        for one in np.unique(kind).tolist():
            if one >= 0:
                positions, skip_first = self._table.kinds[one]
                named = chosen(positions, _step(at, prompt)).numpy().reshape(-1) & (kind == one)
                named = named & (at > 0) if skip_first else named
                found[named] = who[named]
        return found

    def _mark(self, spec: Ints, look: Ints, who: Ints) -> None:
        """For a CPU: which tokens each block has something to do with, and whether gates have."""
        if self._table.static:
            return
        self._buffers.guarded = bool((self._table.looks_kind[who] >= 0).any())
        places = {}
        for block, edited in self._table.edited_at.items():
            found = np.flatnonzero(edited[spec] | self._table.looked_at[block][look])
            if len(found):
                places[block] = torch.from_numpy(found)
        self._buffers.places = places


def _step(at: Ints, prompt: Ints) -> Step:
    """Each token as a row of its own, which is all that `chosen` looks at."""
    one = torch.zeros(1, dtype=torch.long)
    return Step(torch.from_numpy(at).unsqueeze(1), torch.from_numpy(prompt), one, one, 1, 1, False, False, None)
