"""What a spec needs room for: the latents, directions and probes that it edits or reads, by block and SAE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from threading import Lock
from typing import NamedTuple

from demur.errors import InputError
from demur.sae.store import LoadedSae
from demur.spec import Edit, LatentGate, ProbeGate, SteeringSpec
from demur.steering.probe import Probe
from demur.types import parse_hookpoint
from demur.vllm.offered import Known
from demur.vllm.outline import Outline
from demur.vllm.settings import Settings


class Through(NamedTuple):
    """What edits go through at a block."""

    block: int
    sae: str
    """Hash of the SAE; empty for raw directions and probes."""
    exact: bool

    def __str__(self) -> str:
        what = f"SAE {self.sae}" if self.sae else "directions and probes"
        return f"{what} at layers.{self.block}.resid_post{'' if self.exact else ' with exact = false'}"


Slot = int | tuple[str, str]
"""A latent, the hash of a direction and the op along it, or the hash of a probe and `PROBE`."""
PROBE = "probe"


def needs(spec: SteeringSpec) -> dict[Through, list[Slot]]:
    """The slots that a spec edits or reads."""
    found: dict[Through, dict[Slot, None]] = {}
    for edit in spec.edits:
        block = parse_hookpoint(edit.hookpoint).block
        if isinstance(edit, Edit):
            found.setdefault(Through(block, edit.sae, spec.exact), {}).update(dict.fromkeys(edit.latents))
        else:
            found.setdefault(Through(block, "", True), {})[(edit.direction, edit.op)] = None
    if spec.edits and isinstance(spec.gate, LatentGate | ProbeGate):
        found.setdefault(gate_through(spec, spec.gate), {})[gate_slot(spec.gate)] = None
    return {through: list(slots) for through, slots in found.items()}


def gate_through(spec: SteeringSpec, gate: LatentGate | ProbeGate) -> Through:
    """What the gate reads through."""
    block = parse_hookpoint(gate.hookpoint).block
    return Through(block, gate.sae, spec.exact) if isinstance(gate, LatentGate) else Through(block, "", True)


def gate_slot(gate: LatentGate | ProbeGate) -> Slot:
    """The slot that the gate reads."""
    return gate.latent if isinstance(gate, LatentGate) else (gate.probe, PROBE)


class Plan(NamedTuple):
    """The room that is made at the start; the same in every process."""

    slots: dict[Through, tuple[Slot, ...]]
    """Of the named specs."""
    extra: int
    """Further slots of each, for inline specs."""

    @property
    def blocks(self) -> list[int]:
        """Blocks whose output is edited or read."""
        return sorted({through.block for through in self.slots})


def make_plan(known: Known, settings: Settings, outline: Outline) -> Plan:
    """Room for the named specs, and, where inline specs are allowed, for those: through each SAE and probe at the block
    that it was trained on, and everything at `settings.blocks`.

    Raises `InputError` for a block that the model has not, and where nothing could be steered.
    """
    slots: dict[Through, dict[Slot, None]] = {}
    for spec in known.book.specs.values():
        for through, needed in needs(spec).items():
            slots.setdefault(through, {}).update(dict.fromkeys(needed))
    if settings.inline and not settings.locked:
        for block in settings.blocks:
            if block >= outline.n_blocks:
                raise InputError(
                    f"DEMUR_BLOCKS names block {block}, but the model has blocks 0 to {outline.n_blocks - 1}"
                )
        for loaded in known.saes:
            if loaded.sae.d_in == outline.d_model:
                blocks = {*_own_block(loaded), *settings.blocks}
                for block in sorted(block for block in blocks if block < outline.n_blocks):
                    slots.setdefault(Through(block, loaded.hash, True), {})
        if known.directions:
            probes = {parse_hookpoint(one.hookpoint).block for one in known.directions if isinstance(one, Probe)}
            read = {block for block in probes if block < outline.n_blocks}
            for block in sorted({*settings.blocks, *read, *(through.block for through in slots)}):
                slots.setdefault(Through(block, "", True), {})
    if not slots and not known.book.specs:
        raise InputError(
            f"no SAE that demur knows fits a model of width {outline.d_model}, so no inline spec could be carried out; "
            "set DEMUR_SPECS to a folder of specs with their SAE"
        )
    inline = settings.inline and not settings.locked
    return Plan({through: tuple(found) for through, found in slots.items()}, settings.latents if inline else 0)


def _own_block(loaded: LoadedSae) -> list[int]:
    """The block that an SAE was trained on; files from elsewhere may name none, or a place that is no residual."""
    try:
        return [parse_hookpoint(loaded.config.hookpoint).block]
    except InputError:
        return []


class Ledger:
    """Which slots are taken. They are never given back, so that what is promised to a request stays true."""

    def __init__(self, plan: Plan, processes: int = 1) -> None:
        """`processes` share the room of inline specs evenly."""
        self._taken: dict[Through, set[Slot]] = {through: set(slots) for through, slots in plan.slots.items()}
        extra = plan.extra // processes
        self._lock = Lock()  # requests may be taken by several threads
        self._room: Mapping[Through, int] = {through: len(slots) + extra for through, slots in self._taken.items()}

    def claim(self, spec: SteeringSpec) -> None:
        """Take the slots of `spec`. Raises `InputError`, having taken none, where there is no room."""
        wanted = needs(spec)
        with self._lock:
            for through, slots in wanted.items():
                self._check(through, set(slots))
            for through, slots in wanted.items():
                self._taken[through].update(slots)

    def _check(self, through: Through, slots: set[Slot]) -> None:
        if through not in self._room:
            raise InputError(
                f"the spec needs {through}, but this server has room for {_listed(self._room)}; its operator can name "
                "further blocks in DEMUR_BLOCKS, or offer the spec by name"
            )
        taken, room = self._taken[through], self._room[through]
        if len(taken | slots) > room:
            raise InputError(
                f"the spec needs {len(slots - taken)} further slots of {through}, but {len(taken)} of {room} are "
                "taken; use latents that were used before, or ask the operator for a larger DEMUR_INLINE_LATENTS"
            )


def _listed(throughs: Iterable[Through]) -> str:
    return "; ".join(map(str, throughs)) or "nothing"
