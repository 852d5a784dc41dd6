"""A spec as plain vectors added at every token, which is all that some other tools can do; and back.

An `add` edit moves every token by the same vector: the value times a row of the SAE's decoder, or times a direction.
All else depends on what the residual holds (the other ops, gates, runtime normalisation) or on where a token stands,
and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from demur.errors import InputError
from demur.sae.base import Sae
from demur.sae.store import LoadedSae
from demur.spec import DirectionEdit, Edit, Positions, SteeringSpec
from demur.steering.artefacts import Artefacts
from demur.steering.direction import Direction
from demur.steering.vectors import Vector
from demur.types import Hookpoint, parse_hookpoint


class Added(NamedTuple):
    """A spec of `add` edits along directions, and the directions that it names."""

    spec: SteeringSpec
    directions: list[Direction]


def check_addable(spec: SteeringSpec) -> None:
    """Raise `InputError` with the first reason why the spec is no constant vector added at every token.

    `skip_first` is no such reason: whoever writes a file says that its readers do not leave the first token alone.
    """
    if not spec.edits:
        raise InputError("the spec has no edits, so there is no vector to write; give one with at least one add edit")
    if spec.system:
        raise InputError(
            "the spec has a system prompt, which a vector cannot carry; take it out of the spec and give it to the "
            "program that will read the file"
        )
    if spec.gate is not None:
        raise InputError("the spec has a gate, but a vector is added always; take the gate out, or keep the spec")
    if spec.positions != Positions():
        raise InputError(
            f"the spec steers {_described(spec.positions)}, but a vector is added at every one; use positions all, or "
            "keep the spec"
        )
    if spec.mode != "error_preserving":
        raise InputError(
            f"the spec is in {spec.mode} mode, which puts the SAE's reconstruction in place of the residual, and no "
            "added vector does that; use error_preserving"
        )
    for edit in spec.edits:
        if edit.op != "add":
            raise InputError(
                f"the spec has the op {edit.op} at {edit.hookpoint}, which moves each token by what it holds itself, "
                "but a vector is the same for all; only add can be written this way"
            )


def added_vectors(
    model: PreTrainedModel,
    spec: SteeringSpec,
    saes: Mapping[str, Sae] | Sequence[LoadedSae] = (),
    directions: Sequence[Vector] = (),
) -> dict[int, Tensor]:
    """What the spec adds to the output of each 0-based block, [d_model] float32 on the CPU, in order of blocks.

    `saes` and `directions` as for `steer`. Raises `InputError` as `check_addable`, also for an SAE with runtime
    normalisation, and what `steer` raises for an artefact that does not fit the model.
    """
    check_addable(spec)
    found = Artefacts(model, saes, directions, {})
    total: dict[int, Tensor] = {}
    for edit in spec.edits:
        place = parse_hookpoint(edit.hookpoint)
        found.device(place)  # raises for a block that the model has not
        vector = _of_latents(edit, place, found) if isinstance(edit, Edit) else _along(edit, found)
        total[place.block] = total[place.block] + vector if place.block in total else vector
    return dict(sorted(total.items()))


def added_spec(vectors: Mapping[int, Tensor], method: str) -> Added:
    """The spec that adds `vectors` (0-based block to [d_model]) at every token, the first included.

    `method` says where they come from.
    """
    directions = [Direction(vector.float().cpu(), str(Hookpoint(block)), method) for block, vector in vectors.items()]
    edits = tuple(DirectionEdit(direction.hookpoint, direction.hash) for direction in directions)
    return Added(SteeringSpec(edits, skip_first=False), directions)


def _of_latents(edit: Edit, place: Hookpoint, found: Artefacts) -> Tensor:
    sae = found.sae(edit.sae, place, edit.latents)
    if sae.normalize != "none":
        raise InputError(
            f"the SAE {edit.sae} normalises each token ({sae.normalize}), so that one value moves each by a different "
            "length, but a vector is the same for all; use an SAE without normalisation, or a direction"
        )
    values = sae.in_units(edit.latents, edit.value, edit.unit)
    rows = sae.W_dec.detach()[list(edit.latents)].float()
    return (values.to(rows.device) @ rows).cpu()


def _along(edit: DirectionEdit, found: Artefacts) -> Tensor:
    direction = found.direction(edit.direction)
    unit = nn.functional.normalize(direction.vector.float(), dim=0)
    return (edit.value * direction.length(edit.unit) * unit).cpu()


def _described(positions: Positions) -> str:
    every = f"every {positions.every} tokens of " if positions.every > 1 else ""
    first = f", first {positions.first}" if positions.first else ""
    fades = f", half-life {positions.half_life:g}" if positions.half_life else ""
    return f"{every}positions {positions.where}{first}{fades}"
