"""The edits of all specs through one SAE (or along directions) at one block, as tables of fixed size.

A row for each spec that the server knows at the moment, a column for each latent that some spec edits or reads. What a
token does is looked up by the number of its spec, so a batch may mix specs freely, and new specs are new rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from demur.spec import Op
from demur.steering.layer import NO_OP, OPS, change
from demur.vllm.needs import Slot
from demur.vllm.source import Change, Source


class Bank:
    """`specs` rows and `columns` columns; nothing is edited at first."""

    def __init__(
        self, source: Source, specs: int, columns: int, d_model: int, device: torch.device, static: bool
    ) -> None:
        self.source = source
        self.rows = torch.zeros(columns, d_model, device=device)
        """[columns, d_model] what one unit of each slot adds."""
        self._op = torch.full((specs, columns), NO_OP, dtype=torch.int8, device=device)
        self._value = torch.zeros(specs, columns, device=device)
        self._reads = torch.zeros(specs, columns, dtype=torch.bool, device=device)
        # the gate of a spec, and `specs` rows further down its monitor
        self._looks = torch.zeros(2 * specs, columns, dtype=torch.bool, device=device)
        self._gate = torch.zeros(2 * specs, dtype=torch.long, device=device)
        self._threshold = torch.full((2 * specs,), math.inf, device=device)
        self._columns: dict[Slot, int] = {}
        self._static = static
        self._width = columns if static else 0
        self._ops: list[Op] = list(OPS) if static else []

    @property
    def empty(self) -> bool:
        """Whether no column is in use."""
        return self._width == 0

    def install(self, slots: Sequence[Slot]) -> None:
        """Make room for `slots`, where they have none yet."""
        for slot in slots:
            if slot not in self._columns:
                column = len(self._columns)
                assert column < len(self.rows), "more slots than were planned"
                self.rows[column] = self.source.install(column, slot)
                self._columns[slot] = column
        if not self._static:
            self._width = len(self._columns)

    def put(self, spec: int, changes: Sequence[Change], gate: tuple[Slot, tuple[float, float]] | None) -> None:
        """What the spec with the number `spec` does here. `gate`: the slot that its gate reads, and the thresholds of
        the gate and of its monitor."""
        width = len(self.rows)
        op, value = torch.full((width,), NO_OP, dtype=torch.int8), torch.zeros(width)
        for one in changes:
            column = self._columns[one.slot]
            op[column], value[column] = OPS.index(one.op), one.value
            if one.op not in self._ops:
                self._ops.append(one.op)
        looks = torch.zeros(width, dtype=torch.bool)
        if gate is not None:
            looks[self._columns[gate[0]]] = True
        self._op[spec], self._value[spec] = op.to(self._op.device), value.to(self._value.device)
        self._reads[spec] = ((op != NO_OP) & (op != OPS.index("add"))).to(self._reads.device)
        specs = len(self._op)
        for number, row in enumerate((spec, specs + spec)):
            self._looks[row] = looks.to(self._looks.device)
            self._gate[row] = self._columns[gate[0]] if gate is not None else 0
            self._threshold[row] = gate[1][number] if gate is not None else math.inf

    def read(self, x: Tensor, spec: Tensor, look: Tensor) -> tuple[Tensor, Tensor | None]:
        """Activations [n, columns in use] of residuals `x` [n, d_model], and the scale of what is added.

        `spec` [n]: the spec that edits each token, 0 for none. `look` [n]: the spec whose gate looks at it, or
        that plus the number of specs for its monitor.
        """
        x, scale = self.source.prepare(x)
        width = self._width
        return self.source.read(x, self._reads[spec, :width] | self._looks[look, :width]), scale

    def fires(self, f: Tensor, look: Tensor) -> Tensor:
        """[n] bool: the gate of `look` reads here and exceeds its threshold."""
        return f.gather(1, self._gate[look].unsqueeze(1)).squeeze(1) > self._threshold[look]

    def sizes(self, f: Tensor, spec: Tensor) -> Tensor:
        """[n, columns in use] how far each token is moved along each of `rows`."""
        op, value = self._op[spec, : self._width], self._value[spec, : self._width]
        found = torch.zeros_like(f)
        for one in self._ops:
            found = torch.where(op == OPS.index(one), change(one, f, value), found)
        return found

    def added(self, sizes: Tensor) -> Tensor:
        """[n, d_model] what `sizes` add up to."""
        return sizes @ self.rows[: self._width]
