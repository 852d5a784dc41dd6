"""How a bank reads its slots: latents of an SAE, or raw directions and probes, a fixed number of them, filled in as
needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from demur.errors import InputError
from demur.sae.base import Normalize, Reader, Sae
from demur.sae.groupmax import GroupMaxSae
from demur.sae.thresholded import GatedSae, JumpReluSae
from demur.sae.topk import TopKSae
from demur.spec import DirectionEdit, Edit, LatentGate, Op, ProbeGate, SteeringSpec
from demur.steering.direction import Direction
from demur.steering.probe import Probe
from demur.steering.vectors import Vector
from demur.types import parse_hookpoint
from demur.vllm.needs import PROBE, Slot, Through

_CHUNK = 1 << 24
"""Pre-activations held at once."""
_READERS = 64
"""Readers kept, each of one set of latents."""


class Change(NamedTuple):
    """An edit of one slot."""

    slot: Slot
    op: Op
    value: float
    """In the units of the slot."""


class Source(Protocol):
    """What a bank reads from."""

    def install(self, column: int, slot: Slot) -> Tensor:
        """Fill `column` of what is read with `slot`; returns what one unit of it adds, [d_model]."""

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Residuals [n, d_model] as `read` takes them, and the scale [n, 1] of what is added, or None for 1."""

    def read(self, x: Tensor, wanted: Tensor) -> Tensor:
        """Activations [n, columns] of prepared residuals; where they are not `wanted` [n, columns], anything."""

    def changes(self, spec: SteeringSpec, through: Through) -> list[Change]:
        """The edits of `spec` here."""

    def thresholds(self, gate: LatentGate | ProbeGate) -> tuple[float, float]:
        """Above which activation of its slot a gate that reads here opens: where it looks, and, by its monitor, at
        tokens that the model wrote (infinity: not there)."""


class SaeSource:
    """Latents of an SAE.

    On a CPU the latents in use are read by `Sae.reader`, which leaves out tokens where nothing is to be read. On other
    devices every step does the same operations in the same memory, as a CUDA graph must: kinds whose latents depend on
    their own pre-activation alone are read by an SAE of the chosen latents only, the others are encoded whole.
    """

    def __init__(self, sae: Sae, columns: int, exact: bool, static: bool) -> None:
        self._sae, self._exact, self._static = sae, exact, static
        self._latents: list[int] = []
        self._readers = lru_cache(maxsize=_READERS)(self._reader)
        self._thin = _thin(sae, columns, exact) if static else None
        self._index = torch.zeros(columns, dtype=torch.long, device=sae.W_dec.device)

    def install(self, column: int, slot: Slot) -> Tensor:
        """As `Source`. Columns are filled in order."""
        assert isinstance(slot, int)
        assert column == len(self._latents)
        self._latents.append(slot)
        self._index[column] = slot
        if self._thin is not None:
            _copy_latent(self._sae, slot, self._thin, column, self._exact)
        return self._sae.W_dec[slot]

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `Source`."""
        prepared = self._sae.prepare(x)
        return prepared.x, prepared.scale

    def read(self, x: Tensor, wanted: Tensor) -> Tensor:
        """As `Source`."""
        if not self._static:
            return self._read_wanted(x, wanted)
        if self._thin is not None:
            return self._thin.encode_prepared(x)
        parts = x.split(max(1, _CHUNK // self._sae.d_sae))
        return torch.cat([self._sae.encode_prepared(part)[:, self._index] for part in parts])

    def _read_wanted(self, x: Tensor, wanted: Tensor) -> Tensor:
        """By a reader of those columns only that some token wants: the fewer, the faster."""
        columns = tuple(wanted.any(0).nonzero().flatten().tolist())
        if len(columns) == wanted.shape[1]:
            return self._readers(columns)(x, wanted)
        found = x.new_zeros(wanted.shape)
        if columns:
            found[:, columns] = self._readers(columns)(x, wanted[:, columns])
        return found

    def _reader(self, columns: tuple[int, ...]) -> Reader:
        return self._sae.reader([self._latents[column] for column in columns], self._exact)

    def changes(self, spec: SteeringSpec, through: Through) -> list[Change]:
        """As `Source`."""
        return [
            Change(latent, edit.op, value)
            for edit in spec.edits
            if isinstance(edit, Edit) and _through(edit, spec) == through
            for latent, value in zip(
                edit.latents, self._sae.in_units(edit.latents, edit.value, edit.unit).tolist(), strict=True
            )
        ]

    def thresholds(self, gate: LatentGate | ProbeGate) -> tuple[float, float]:
        """As `Source`, in latent units."""
        assert isinstance(gate, LatentGate)
        return float(self._sae.in_units([gate.latent], gate.threshold, gate.unit)[0]), math.inf


class DirectionSource:
    """Raw directions and probes.

    `add` is an addition to the coefficient along a direction, `project_out` the ablation of it. A probe is only read:
    its row holds the weights, so that its activation is the logit without the bias.
    """

    def __init__(self, vectors: Sequence[Vector], columns: int, d_model: int, device: torch.device) -> None:
        self._directions = {one.hash: one for one in vectors if isinstance(one, Direction)}
        self._probes = {one.hash: one for one in vectors if isinstance(one, Probe)}
        self._rows = torch.zeros(columns, d_model, device=device)

    def install(self, column: int, slot: Slot) -> Tensor:
        """As `Source`."""
        assert isinstance(slot, tuple)
        name, what = slot
        if what == PROBE:
            self._rows[column] = self._probes[name].weight
        else:
            self._rows[column] = nn.functional.normalize(self._directions[name].vector.float(), dim=0)
        return self._rows[column]

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `Source`."""
        return x.to(self._rows.dtype), None

    def read(self, x: Tensor, wanted: Tensor) -> Tensor:
        """As `Source`."""
        return x @ self._rows[: wanted.shape[1]].T

    def changes(self, spec: SteeringSpec, through: Through) -> list[Change]:
        """As `Source`; several additions along one direction are one."""
        found: dict[Slot, Change] = {}
        for edit in spec.edits:
            if isinstance(edit, DirectionEdit) and parse_hookpoint(edit.hookpoint).block == through.block:
                slot = (edit.direction, edit.op)
                before = found[slot].value if slot in found else 0.0
                size = edit.value * self._directions[edit.direction].length(edit.unit)
                added = edit.op == "add"
                found[slot] = Change(slot, "add", before + size) if added else Change(slot, "ablate", 0.0)
        return list(found.values())

    def thresholds(self, gate: LatentGate | ProbeGate) -> tuple[float, float]:
        """As `Source`: the logits of the gate's probabilities, less the probe's bias."""
        assert isinstance(gate, ProbeGate)
        bias = self._probes[gate.probe].bias
        return _logit(gate.threshold) - bias, _logit(gate.monitor) - bias


def _logit(probability: float) -> float:
    """Infinite at 0 and 1, which no probability goes beyond."""
    if probability in (0, 1):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


def _through(edit: Edit, spec: SteeringSpec) -> Through:
    return Through(parse_hookpoint(edit.hookpoint).block, edit.sae, spec.exact)


def _thin(sae: Sae, columns: int, exact: bool) -> Sae | None:
    """An SAE of `columns` latents, all zero, that reads prepared residuals; None for a kind whose latents depend on
    one another."""
    plain: Normalize = "none"
    if isinstance(sae, TopKSae) and not exact:
        found: Sae = JumpReluSae(sae.d_in, columns, plain, sae.subtract_b_dec)
    elif isinstance(sae, JumpReluSae | GatedSae):
        found = type(sae)(sae.d_in, columns, plain, sae.subtract_b_dec)
    elif isinstance(sae, TopKSae | GroupMaxSae):
        return None
    else:
        raise InputError(
            f"the SAE's architecture {sae.kind} takes as many steps as each token needs, which no CUDA graph can hold; "
            "use another SAE, or demur's own server"
        )
    return found.to(sae.W_enc.device, sae.W_enc.dtype).requires_grad_(False)


def _copy_latent(sae: Sae, latent: int, thin: Sae, column: int, exact: bool) -> None:
    with torch.no_grad():
        for name, value in sae.named_parameters():
            into = getattr(thin, name)
            if name == "b_dec":
                into.copy_(value)
            elif name == "W_enc":
                into[:, column] = value[:, latent]
            else:
                into[column] = value[latent]
        if isinstance(sae, TopKSae) and isinstance(thin, JumpReluSae):
            if sae.reference is None:
                raise InputError("exact = false needs the SAE's reference statistics, which this SAE has not")
            # active from the stored threshold on, where a JumpReLU is active above its own
            own = sae.reference.threshold.to(thin.threshold)
            thin.threshold[column] = torch.nextafter(own, own.new_tensor(-math.inf))
