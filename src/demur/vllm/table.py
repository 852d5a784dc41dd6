"""The specs that a worker knows at the moment, by number, and everything that depends on that number."""

from __future__ import annotations

import numpy as np
import torch

from demur.spec import LatentGate, Positions, ProbeGate, SteeringSpec
from demur.steering.artefacts import Artefacts
from demur.types import parse_hookpoint
from demur.vllm.bank import Bank
from demur.vllm.buffers import Buffers
from demur.vllm.needs import Plan, Through, gate_slot, gate_through, needs
from demur.vllm.offered import Known
from demur.vllm.place import Place
from demur.vllm.source import DirectionSource, SaeSource

UNSTEERED_NUMBER = 0


class Table:
    """Room for `capacity` specs besides the unsteered one; `put` makes room by forgetting specs that nobody uses."""

    def __init__(
        self,
        plan: Plan,
        known: Known,
        found: Artefacts,
        d_model: int,
        capacity: int,
        device: torch.device,
        static: bool,
    ) -> None:
        self._known, self.static = known, static
        self._numbers: dict[SteeringSpec, int] = {SteeringSpec(): UNSTEERED_NUMBER}
        self._specs: list[SteeringSpec | None] = [SteeringSpec(), *[None] * capacity]
        self._uses = np.zeros(capacity + 1, dtype=np.int64)
        self._banks: dict[Through, Bank] = {}
        self._sources: dict[Through, SaeSource | DirectionSource] = {}
        for through, slots in plan.slots.items():
            columns = max(1, len(slots) + plan.extra)
            source: SaeSource | DirectionSource
            if through.sae:
                place = parse_hookpoint(str(through.block))
                source = SaeSource(found.sae(through.sae, place, ()), columns, through.exact, static)
            else:
                source = DirectionSource(known.directions, columns, d_model, device)
            bank = Bank(source, capacity + 1, columns, d_model, device, static)
            bank.install(slots)
            self._banks[through], self._sources[through] = bank, source
        self.kinds: list[tuple[Positions, bool]] = []
        """Positions, and whether the first token is left out."""
        self.edits_kind = np.full(capacity + 1, -1)
        """[specs] index into `kinds` of the tokens that are edited; -1 for none."""
        self.looks_kind = np.full(capacity + 1, -1)
        """[specs] and of those that the gate looks at; -1 without a gate."""
        self.monitors = np.zeros(capacity + 1, dtype=bool)
        """[specs] the gate also looks at every token that the model writes, by a threshold of its own."""
        self.label = np.zeros(capacity + 1, dtype=np.int64)
        """[specs] what requests under it count under: an index into `labels`."""
        self.labels = ["unsteered", *known.book.specs, "inline"]
        blocks = plan.blocks
        self.edited_at = {block: np.zeros(capacity + 1, dtype=bool) for block in blocks}
        """[specs] by block: tokens that the spec edits somewhere matter at the block."""
        self.looked_at = {block: np.zeros(2 * (capacity + 1), dtype=bool) for block in blocks}
        """[2 specs] by block: the spec's gate reads there; then the same of its monitor."""
        self.places: dict[int, Place] = {}

    def attach(self, buffers: Buffers, device: torch.device) -> None:
        """Make the places that read `buffers`, and put the named specs where they stay."""
        for block in self.edited_at:
            here = {through: bank for through, bank in self._banks.items() if through.block == block}
            self.places[block] = Place(block, here, buffers, len(self._specs), device, self.static)
        for spec in self._known.book.specs.values():
            if spec.edits:
                self.use(spec)  # and never let go

    def use(self, spec: SteeringSpec) -> int:
        """The number of `spec`, which stays its own until `release`."""
        number = self._numbers.get(spec)
        if number is None:
            number = self._free()
            self._put(number, spec)
        self._uses[number] += 1
        return number

    def release(self, number: int) -> None:
        """One user of the spec has left."""
        self._uses[number] -= 1

    @property
    def monitor(self) -> int:
        """What is added to the number of a spec where its gate's monitor looks at a token."""
        return len(self._specs)

    def gated(self, number: int) -> bool:
        """Whether the spec has a gate."""
        return bool(self.looks_kind[number] >= 0)

    def _free(self) -> int:
        for number in range(1, len(self._specs)):
            if self._specs[number] is None:
                return number
        for number in range(1, len(self._specs)):
            if self._uses[number] == 0:
                old = self._specs[number]
                assert old is not None
                del self._numbers[old]
                self._specs[number] = None
                return number
        raise AssertionError("more specs in use than requests can be")

    def _put(self, number: int, spec: SteeringSpec) -> None:
        wanted = needs(spec)
        gate = spec.gate if spec.edits else None
        assert gate is None or isinstance(gate, LatentGate | ProbeGate)
        read_by = gate_through(spec, gate) if gate is not None else None
        for through, bank in self._banks.items():
            bank.install(wanted.get(through, ()))
            source = self._sources[through]
            looked = None
            if gate is not None and through == read_by:
                looked = (gate_slot(gate), source.thresholds(gate))
            bank.put(number, source.changes(spec, through) if through in wanted else (), looked)
        self.edits_kind[number] = self._kind(spec.positions, spec.skip_first)
        self.looks_kind[number] = self._kind(gate.positions, spec.skip_first) if gate is not None else -1
        self.monitors[number] = isinstance(gate, ProbeGate) and gate.monitor < 1
        self.label[number] = self.labels.index(self._known.book.label(spec))
        for block, place in self.places.items():
            here = read_by is not None and read_by.block == block
            place.gate_here[number] = here
            place.gated[number] = gate is not None
            self.looked_at[block][[number, number + len(self._specs)]] = here
            # where the gate reads, what it has decided before must be looked up for every token that it guards
            self.edited_at[block][number] = here or any(through.block == block for through in wanted)
        self._specs[number], self._numbers[spec] = spec, number

    def _kind(self, positions: Positions, skip_first: bool) -> int:
        kind = (positions, skip_first)
        if kind not in self.kinds:
            self.kinds.append(kind)
        return self.kinds.index(kind)
