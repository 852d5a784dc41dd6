"""The edits at one hookpoint, for all specs of a batch at once: residual in, what to add to it out.

Encoding, changing some latents, decoding and adding the SAE's error back is exactly x + sum (z' - z) W_dec over the
changed latents, because every other term cancels (the error term is kept, unlike in O'Brien et al., arXiv 2411.11296).
So nothing is decoded; the only question is z of those latents, which `Sae.reader` answers exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from demur.sae.base import Sae
from demur.spec import DirectionEdit, Edit, Op
from demur.steering.counter import Move
from demur.steering.direction import Direction

_NONE = -1
_OPS: tuple[Op, ...] = ("clamp", "floor", "ceil", "add", "scale", "ablate")


def change(op: Op, f: Tensor, value: Tensor) -> Tensor:
    """z' - z of a latent with activation `f` under `op`, elementwise."""
    if op == "clamp":
        return value - f
    if op == "floor":
        return (value - f).relu()
    if op == "ceil":
        return -(f - value).relu()
    if op == "add":
        return value.expand_as(f)
    if op == "scale":
        return (value - 1) * f
    return -f


class SaeEdits:
    """Edits through one SAE at one hookpoint; `specs[s]` are those of spec s."""

    def __init__(
        self, sae: Sae, name: str, specs: Sequence[Sequence[Edit]], exact: bool, reconstruct: Sequence[bool]
    ) -> None:
        latents = sorted({latent for edits in specs for edit in edits for latent in edit.latents})
        column = {latent: i for i, latent in enumerate(latents)}
        device, dtype = sae.W_dec.device, sae.W_dec.dtype
        self._sae = sae
        self.names = [f"latent {latent} of {name}" for latent in latents]
        self._reader = sae.reader(latents, exact)
        self._rows = sae.W_dec[torch.as_tensor(latents, device=device)]
        self._norms = self._rows.norm(dim=1)
        op = torch.full((len(specs), len(latents)), _NONE)
        value = torch.zeros(len(specs), len(latents))
        for s, edits in enumerate(specs):
            for edit in edits:
                columns = [column[latent] for latent in edit.latents]
                op[s, columns] = _OPS.index(edit.op)
                value[s, columns] = sae.in_units(edit.latents, edit.value, edit.unit).cpu()
        self._ops: list[Op] = [one for i, one in enumerate(_OPS) if bool((op == i).any())]
        self._op, self._value = op.to(device), value.to(device, dtype)
        self._some = self._op != _NONE
        self._reads = self._some & (self._op != _OPS.index("add"))
        self._reconstruct = torch.tensor(reconstruct, device=device) if any(reconstruct) else None

    def move(self, x: Tensor, which: Tensor, on: Tensor) -> Move:
        """What to add to residuals `x` [n, d_in]; `which` [n] or [1] names each one's spec, `on` [n] steers or not."""
        prepared = self._sae.prepare(x)
        on = on.unsqueeze(-1)
        f = self._reader(prepared.x, on & self._reads[which])
        op, value = self._op[which], self._value[which]
        moved = change(self._ops[0], f, value)
        for other in self._ops[1:]:
            moved = torch.where(op == _OPS.index(other), change(other, f, value), moved)
        acts = on & self._some[which]
        moved = moved * acts
        delta = moved @ self._rows
        norms = moved.abs() * self._norms
        if prepared.scale is not None:
            delta, norms = delta * prepared.scale, norms * prepared.scale
        if self._reconstruct is not None:
            lost = self._sae.reconstruct(x) - x.to(delta.dtype)
            delta = delta + lost * (self._reconstruct[which].unsqueeze(-1) & on)
        return Move(delta, acts, norms)


class DirectionEdits:
    """Edits along raw directions at one hookpoint; `specs[s]` are those of spec s."""

    def __init__(
        self, directions: Mapping[str, Direction], specs: Sequence[Sequence[DirectionEdit]], device: torch.device
    ) -> None:
        found = list(dict.fromkeys((edit.direction, edit.op) for edits in specs for edit in edits))
        self.names = [f"direction {name}, {op}" for name, op in found]
        vectors = torch.stack([directions[name].vector.float() for name, _ in found])
        add, out = torch.zeros(2, len(specs), len(found))
        for s, edits in enumerate(specs):
            for edit in edits:
                slot = found.index((edit.direction, edit.op))
                if edit.op == "add":
                    add[s, slot] += edit.value * directions[edit.direction].length(edit.unit)
                else:
                    out[s, slot] = 1
        self._units = torch.nn.functional.normalize(vectors, dim=1).to(device)
        self._add, self._out = add.to(device), out.to(device)

    def move(self, x: Tensor, which: Tensor, on: Tensor) -> Move:
        """As `SaeEdits.move`."""
        add, out = self._add[which], self._out[which]
        acts = on.unsqueeze(-1) & ((add != 0) | (out != 0))
        size = (add - (x.float() @ self._units.T) * out) * acts
        return Move(size @ self._units, acts, size.abs())
