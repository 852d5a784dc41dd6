"""Which specs can be carried out inside vLLM."""

from __future__ import annotations

from demur.errors import DemurError, InputError
from demur.spec import Edit, NamedGate, Positions, SteeringSpec
from demur.steering.artefacts import Artefacts
from demur.steering.positions import OWNERS
from demur.types import parse_hookpoint
from demur.vllm.offered import Known


def check_spec(spec: SteeringSpec, found: Artefacts) -> None:
    """Raise `InputError` or `MismatchError` unless vLLM can carry `spec` out on the model that `found` belongs to."""
    if spec.system:
        raise InputError(
            "the spec has a system prompt, but vLLM has formatted the conversation before demur sees it; take it out "
            "of the spec and send it as a system message"
        )
    if not spec.edits:
        return
    if spec.mode != "error_preserving":
        raise InputError(
            f"the spec is in {spec.mode} mode, which is for measuring an SAE and not for serving; use "
            "error_preserving, or demur's own engine"
        )
    _check_positions("positions", spec.positions)
    for edit in spec.edits:
        place = parse_hookpoint(edit.hookpoint)
        found.device(place)
        if isinstance(edit, Edit):
            sae = found.sae(edit.sae, place, edit.latents)
            sae.in_units(edit.latents, edit.value, edit.unit)
            if not spec.exact:
                sae.reader(edit.latents, exact=False)  # raises without a stored threshold
        else:
            found.direction(edit.direction).length(edit.unit)
    if isinstance(spec.gate, NamedGate):
        raise InputError(
            f"the spec has the gate {spec.gate.name!r}, a function of the caller's, which no server has; use a gate on "
            "a latent"
        )
    if spec.gate is not None:
        _check_positions("the gate's positions", spec.gate.positions)
        found.gate(spec.gate, spec)


def _check_positions(what: str, positions: Positions) -> None:
    if positions.where in OWNERS:
        raise InputError(
            f"{what} are {positions.where!r}, which need the chat template's marks, and those are not followed inside "
            "vLLM; use prompt, generation, last_prompt_token or all, or demur's own server"
        )


def check_named(known: Known, found: Artefacts) -> None:
    """Raise `InputError`, naming the spec, unless every named spec can be carried out."""
    for name, spec in known.book.specs.items():
        try:
            check_spec(spec, found)
        except DemurError as error:
            raise InputError(f"the spec {name!r} does not fit: {error}") from error
