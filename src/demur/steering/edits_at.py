"""Where specs edit, and the edits at one hookpoint of all specs, gathered by the SAE or direction they go through."""

from __future__ import annotations

from collections.abc import Sequence

from demur.errors import InputError
from demur.spec import DirectionEdit, Edit, SteeringSpec, TextGate
from demur.steering.artefacts import Artefacts
from demur.steering.layer import DirectionEdits, Edits, SaeEdits
from demur.types import Hookpoint, parse_hookpoint


def lowest_hookpoint(specs: Sequence[SteeringSpec]) -> Hookpoint | None:
    """The lowest place where one of `specs` edits or decides, below which nothing differs; None if none does."""
    places = [edit.hookpoint for spec in specs for edit in spec.edits]
    gates = [spec.gate for spec in specs if spec.edits]
    places += [gate.hookpoint for gate in gates if gate and not isinstance(gate, TextGate)]
    return min(map(parse_hookpoint, places), key=lambda place: place.block, default=None)


def edits_at(place: Hookpoint, specs: Sequence[SteeringSpec], found: Artefacts) -> list[Edits]:
    """The edits at `place` of all specs, put together by what they go through.

    Raises `InputError` and `MismatchError` for edits that cannot be carried out there.
    """
    here = [[edit for edit in one.edits if parse_hookpoint(edit.hookpoint) == place] for one in specs]
    through = [[edit for edit in edits if isinstance(edit, Edit)] for edits in here]
    along = [[edit for edit in edits if isinstance(edit, DirectionEdit)] for edits in here]
    groups: list[Edits] = []
    for one, edits in zip(specs, through, strict=True):
        if one.mode == "reconstruct" and len({edit.sae for edit in edits}) > 1:
            raise InputError(f"a spec in reconstruct mode has two SAEs at {place}, but only one can rebuild it")
    kinds = dict.fromkeys((e.sae, one.exact) for one, edits in zip(specs, through, strict=True) for e in edits)
    for name, exact in kinds:
        mine = [
            [edit for edit in edits if (edit.sae, one.exact) == (name, exact)]
            for one, edits in zip(specs, through, strict=True)
        ]
        sae = found.sae(name, place, [latent for edits in mine for edit in edits for latent in edit.latents])
        rebuilt = [bool(edits) and one.mode == "reconstruct" for one, edits in zip(specs, mine, strict=True)]
        groups.append(SaeEdits(sae, name, mine, exact, rebuilt))
    if any(along):
        known = {edit.direction: found.direction(edit.direction) for edits in along for edit in edits}
        groups.append(DirectionEdits(known, along, found.device(place)))
    return groups
