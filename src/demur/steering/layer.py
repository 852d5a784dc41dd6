"""The edits at one hookpoint, for all specs of a batch at once: residual in, sizes of moves along fixed rows out.

Encoding, changing some latents, decoding and adding the SAE's error back is exactly x + sum (z' - z) W_dec over the
changed latents, because every other term cancels (the error term is kept, unlike in O'Brien et al., arXiv 2411.11296).
So nothing is decoded; the only question is z of those latents, which `Sae.reader` answers exactly. For a small model a
step of generation is a few hundred tensor operations, so the ones here are counted: six for a thresholded SAE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from demur.sae.base import Sae
from demur.spec import DirectionEdit, Edit, Op
from demur.steering.direction import Direction

NO_OP = -1
OPS: tuple[Op, ...] = get_args(Op)
"""In tables ops are numbers: their places here."""


class Move(NamedTuple):
    """How far residuals are to be moved along each of a group's rows."""

    acts: Tensor
    """[n, slots] bool: the edit of this latent or direction is in force."""
    sizes: Tensor
    """[n, slots], zero where it is not in force."""


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
        self._plain = sae.normalize == "none"
        self.rows = sae.W_dec[torch.as_tensor(latents, device=device)]
        """[slots, d_model] what one unit of each slot adds."""
        op = torch.full((len(specs), len(latents)), NO_OP)
        value = torch.zeros(len(specs), len(latents))
        for s, edits in enumerate(specs):
            for edit in edits:
                columns = [column[latent] for latent in edit.latents]
                op[s, columns] = OPS.index(edit.op)
                value[s, columns] = sae.in_units(edit.latents, edit.value, edit.unit).cpu()
        self._ops: list[Op] = [one for i, one in enumerate(OPS) if bool((op == i).any())]
        reads = (op != NO_OP) & (op != OPS.index("add"))
        self._op, self._value = op.to(device), value.to(device, dtype)
        self._some, self._reads = (op != NO_OP).to(device), reads.to(device)
        self._all, self._reads_all = bool((op != NO_OP).all()), bool(reads.all())
        self._reconstruct = torch.tensor(reconstruct, device=device) if any(reconstruct) else None

    def move(self, x: Tensor, which: Tensor, on: Tensor) -> Move:
        """How to move residuals `x` [n, d_in], in the SAE's precision.

        `which` [n] or [1] names each one's spec, `on` [n, 1] (bool) steers or not.
        """
        scale = None
        if not self._plain:
            x, scale, _ = self._sae.prepare(x)
        one = len(self.names) == 1
        acts = (on if one else on.expand(-1, len(self.names))) if self._all else on & self._some[which]
        f = self._reader(x, acts if self._reads_all else on & self._reads[which])
        value = self._value if len(self._value) == 1 else self._value[which]
        sizes = change(self._ops[0], f, value)
        for other in self._ops[1:]:
            sizes = torch.where(self._op[which] == OPS.index(other), change(other, f, value), sizes)
        sizes = sizes * acts
        return Move(acts, sizes if scale is None else sizes * scale)

    def lost(self, x: Tensor, which: Tensor, on: Tensor) -> Tensor | None:
        """What specs in reconstruct mode take away besides: the SAE's error, [n, d_in]."""
        if self._reconstruct is None:
            return None
        return (self._sae.reconstruct(x) - x) * (self._reconstruct[which].unsqueeze(-1) & on)


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
        self.rows = torch.nn.functional.normalize(vectors, dim=1).to(device)
        """[slots, d_model] of unit length."""
        self._add, self._out = add.to(device), out.to(device)

    def move(self, x: Tensor, which: Tensor, on: Tensor) -> Move:
        """As `SaeEdits.move`."""
        add, out = self._add[which], self._out[which]
        acts = on & ((add != 0) | (out != 0))
        return Move(acts, (add - (x @ self.rows.T) * out) * acts)

    def lost(self, x: Tensor, which: Tensor, on: Tensor) -> Tensor | None:
        """Nothing."""
        return None


Edits = SaeEdits | DirectionEdits
"""A group of edits at one hookpoint that go through the same thing."""


def apply(
    groups: Sequence[Edits],
    x: Tensor,
    which: Tensor,
    on: Tensor,
    count: Callable[[int, Move], None] = lambda group, move: None,
    strength: Tensor | None = None,
) -> Tensor:
    """Residuals `x` [n, d_model] after all `groups`, each of which reads them as they came.

    `which`, `on`: as in `SaeEdits.move`. `count` is told the number of each group and its move.
    `strength` [n, 1]: the share of their way that the moves go; None: all of it.
    """
    edited = x
    for number, group in enumerate(groups):
        move = group.move(x, which, on)
        lost = group.lost(x, which, on)
        if strength is not None:
            move = Move(move.acts, move.sizes * strength)
            lost = None if lost is None else lost * strength
        count(number, move)
        edited = torch.addmm(edited, move.sizes, group.rows)
        edited = edited if lost is None else edited + lost
    return edited
