"""Which specs can be carried out inside vLLM."""

from __future__ import annotations

from demur.errors import DemurError, InputError
from demur.spec import Edit, NamedGate, Positions, ProbeGate, SteeringSpec, TextGate
from demur.steering.artefacts import Artefacts
from demur.steering.positions import OWNERS
from demur.steering.probe import Probe
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
    if isinstance(spec.gate, TextGate):
        raise InputError(
            f"the spec's gate asks {spec.gate.classifier} about the conversation's text, which demur does not see "
            "inside vLLM; use a gate on a latent or a probe, or demur's own server"
        )
    if isinstance(spec.gate, NamedGate):
        raise InputError(
            f"the spec has the gate {spec.gate.name!r}, a function of the caller's, which no server has; use a gate on "
            "a latent"
        )
    if spec.gate is not None:
        _check_positions("the gate's positions", spec.gate.positions)
        if isinstance(spec.gate, ProbeGate):
            _check_probe(spec.gate, found.probe(spec.gate))
            found.probability(spec.gate, spec)
        else:
            found.gate(spec.gate, spec)


def _check_probe(gate: ProbeGate, probe: Probe) -> None:
    """What is read here is one product with the residual, compared with a number."""
    if probe.sae:
        raise InputError(
            f"the gate's probe {gate.probe} reads {len(probe.latents)} SAE latents, which vLLM does not follow; train "
            "one on the residual, gate on a latent, or use demur's own server"
        )
    if probe.pool != "token":
        raise InputError(
            f"the gate's probe {gate.probe} reads a whole turn ({probe.pool}), and turns are not followed inside "
            "vLLM; train one that reads the last token, or use demur's own server"
        )
    if gate.later is not None:
        raise InputError(
            "the gate has another threshold in later turns, and turns are not followed inside vLLM; leave `later` out, "
            "or use demur's own server"
        )
    if gate.strength != "full":
        raise InputError(
            "the gate has strength 'probability', but inside vLLM a gate is open or shut; use full, or demur's own "
            "server"
        )
    if gate.monitor < 1 and gate.positions.where not in ("prompt", "last_prompt_token"):
        raise InputError(
            f"the gate has a monitor and positions {gate.positions.where!r}, but inside vLLM a token is held against "
            "one threshold; use positions prompt or last_prompt_token, or leave the monitor out"
        )


def _check_positions(what: str, positions: Positions) -> None:
    if positions.half_life:
        raise InputError(
            f"{what} have a half_life, which vLLM does not follow; use first in its place, or demur's own server"
        )
    if positions.where in OWNERS:
        raise InputError(
            f"{what} are {positions.where!r}, which need the chat template's marks, and those are not followed inside "
            "vLLM; use prompt, generation, answer, last_prompt_token or all, or demur's own server"
        )


def check_named(known: Known, found: Artefacts) -> None:
    """Raise `InputError`, naming the spec, unless every named spec can be carried out."""
    for name, spec in known.book.specs.items():
        try:
            check_spec(spec, found)
        except DemurError as error:
            raise InputError(f"the spec {name!r} does not fit: {error}") from error
