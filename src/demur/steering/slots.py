"""Steering of a batch whose rows come and go: each slot has a spec of its own for as long as a row is in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch

from demur.lm.attach import attach_all
from demur.lm.load import LanguageModel
from demur.sae.base import Sae
from demur.sae.store import LoadedSae
from demur.spec import SteeringSpec
from demur.steering.artefacts import Artefacts
from demur.steering.counter import Counter
from demur.steering.gates import Fires
from demur.steering.rows import Rows
from demur.steering.steer import edits_of, turns_of
from demur.steering.vectors import Vector


class Tokens(NamedTuple):
    """What happened in a slot since its spec was put there."""

    steered: int
    """Tokens on which some edit was in force."""
    changed: int
    """Tokens whose residual one edit moved, for the edit that moved most."""


class Slots:
    """Which spec each slot has."""

    def __init__(self, lm: LanguageModel, n: int, found: Artefacts, keep: Sequence[SteeringSpec]) -> None:
        self._lm, self._found, self._keep = lm, found, [SteeringSpec(), *keep]
        self._specs: list[SteeringSpec] = []
        self._of = torch.zeros(n, dtype=torch.long, device=lm.device)
        self._rows: Rows | None = None
        self._counters: list[Counter] = []
        self._before = torch.zeros(2, n, dtype=torch.long)
        self._stack = ExitStack()
        self._know(list(dict.fromkeys(self._keep)))

    def check(self, spec: SteeringSpec) -> None:
        """Raise what `steer` has to say about the spec."""
        rows = Rows([spec], self._found, turns_of(self._lm, [spec], self._found))
        edits_of([spec], self._found, rows)

    def put(self, slot: int, spec: SteeringSpec) -> None:
        """Steer the next row in `slot` by `spec`. Raises as `steer` does, and then nothing has changed."""
        if spec not in self._specs:
            self._of[slot] = self._specs.index(SteeringSpec())
            self._know([*(one for one in self._specs if one in self._wanted()), spec])
        self._of[slot] = self._specs.index(spec)

    def take(self, slot: int) -> Tokens:
        """What happened in `slot`, whose row has left; the slot is unsteered from here on."""
        steered, changed = (self._before + self._counted())[:, slot].tolist()
        for counter in self._counters:
            counter.forget(slot)
        self._before[:, slot] = 0
        self._of[slot] = self._specs.index(SteeringSpec())
        wanted = self._wanted()
        if len(wanted) < len(self._specs):  # every row pays for what is attached
            self._know([one for one in self._specs if one in wanted])
        return Tokens(steered, changed)

    def close(self) -> None:
        """Let go of the model."""
        self._stack.close()

    def _wanted(self) -> set[SteeringSpec]:
        """Specs to stay attached."""
        return {*self._keep, *(self._specs[i] for i in self._of.tolist())}

    def _know(self, specs: list[SteeringSpec]) -> None:
        """Attach `specs` in place of those that are attached; rows and their gates go on as they were."""
        rows = Rows(specs, self._found, turns_of(self._lm, specs, self._found), before=self._rows)
        edits = edits_of(specs, self._found, rows)
        of = torch.tensor([specs.index(self._specs[i]) if self._specs else 0 for i in self._of.tolist()])
        self._before += self._counted()
        self._stack.close()
        self._of = of.to(self._of.device)
        rows.slots(self._of)
        self._specs, self._rows, self._counters = specs, rows, edits.counters
        self._stack.enter_context(attach_all(self._lm.model, edits.hooks, rests=rows.rests))

    def _counted(self) -> torch.Tensor:
        """[2, slots] tokens steered and changed under the edits that are attached."""
        most = torch.zeros_like(self._before)
        for counter in self._counters:
            for one in counter.slots():
                n = len(one.steered)
                most[:, :n] = torch.maximum(most[:, :n], torch.tensor([one.steered, one.changed]))
        return most


@contextmanager
def steer_slots(
    lm: LanguageModel,
    n: int,
    saes: Mapping[str, Sae] | Sequence[LoadedSae] = (),
    *,
    directions: Sequence[Vector] = (),
    gates: Mapping[str, Fires] | None = None,
    keep: Sequence[SteeringSpec] = (),
) -> Iterator[Slots]:
    """Steer rows by the slot they are in (`Step.rows`, below `n`) inside the block; every slot is unsteered at first.

    `keep`: specs that stay attached when no slot has them, as they will be wanted again. As `steer` otherwise.
    """
    slots = Slots(lm, n, Artefacts(lm.model, saes, directions, gates or {}), keep)
    try:
        yield slots
    finally:
        slots.close()
