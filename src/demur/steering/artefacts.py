"""What a spec names by hash or name, found and checked against the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from demur.errors import InputError, MismatchError
from demur.lm.hookpoints import device_at, width
from demur.sae.base import Sae
from demur.sae.store import LoadedSae, embedded_sae
from demur.spec import Gate, LatentGate, NamedGate, ProbeGate, SteeringSpec, TextGate
from demur.steering.direction import Direction
from demur.steering.gates import Fires, Probability, latent_exceeds
from demur.steering.probe import Probe
from demur.steering.shipped import shipped_probes
from demur.steering.vectors import Vector
from demur.types import Hookpoint, parse_hookpoint


class Artefacts:
    """SAEs, directions, probes and gate functions for a model; each is checked when it is asked for."""

    def __init__(
        self,
        model: PreTrainedModel,
        saes: Mapping[str, Sae] | Sequence[LoadedSae],
        directions: Sequence[Vector],
        gates: Mapping[str, Fires],
    ) -> None:
        self._model = model
        self._saes = dict(saes) if isinstance(saes, Mapping) else {loaded.hash: loaded.sae for loaded in saes}
        self._directions = {one.hash: one for one in directions if isinstance(one, Direction)}
        self._probes = {one.hash: one for one in directions if isinstance(one, Probe)}
        self._gates = dict(gates)

    def add(self, direction: Direction) -> None:
        """Know one more direction."""
        self._directions[direction.hash] = direction

    def device(self, place: Hookpoint) -> torch.device:
        """Where the residual at `place` lives. Raises `InputError` for a hookpoint outside the model."""
        return device_at(self._model, place)

    def sae(self, name: str, place: Hookpoint, latents: Iterable[int]) -> Sae:
        """The SAE with the hash `name`, on the device of `place`; it must have `latents` and the model's width."""
        sae = self._saes.get(name)
        if sae is None:
            found = embedded_sae(name)
            if found is None:
                raise MismatchError(
                    f"the spec wants the SAE {name}, but only {', '.join(self._saes) or 'none'} is loaded and none "
                    "that ships with demur has this hash; give the SAE that the spec was made with"
                )
            sae = found.sae
        if sae.d_in != width(self._model):
            raise MismatchError(
                f"the SAE reads residuals of width {sae.d_in}, but the model's are {width(self._model)} wide"
            )
        for latent in latents:
            if latent >= sae.d_sae:
                raise InputError(f"latent {latent} does not exist; the SAE has latents 0 to {sae.d_sae - 1}")
        self._saes[name] = sae.to(self.device(place))
        return self._saes[name]

    def direction(self, name: str) -> Direction:
        """The direction with the hash `name`."""
        found = self._directions.get(name)
        if found is None:
            raise MismatchError(
                f"the spec wants the direction {name}, but only {', '.join(self._directions) or 'none'} was given; "
                "give the direction that the spec was made with"
            )
        if len(found.vector) != width(self._model):
            raise MismatchError(
                f"direction {name} has {len(found.vector)} numbers, but the model's residual is "
                f"{width(self._model)} wide"
            )
        return found

    def probe(self, gate: ProbeGate) -> Probe:
        """The probe of the gate."""
        found = self._probes.get(gate.probe) or shipped_probes().get(gate.probe)
        if found is None:
            raise MismatchError(
                f"the spec wants the probe {gate.probe}, but only {', '.join(self._probes) or 'none'} was given and "
                "none that ships with demur has this hash; give the file that demur gate train wrote"
            )
        if found.hookpoint != str(parse_hookpoint(gate.hookpoint)):
            raise MismatchError(
                f"the gate reads {gate.hookpoint}, but its probe {gate.probe} was trained at {found.hookpoint}; give "
                "the gate the probe's hookpoint"
            )
        if not found.sae and found.width != width(self._model):
            raise MismatchError(
                f"probe {gate.probe} reads {found.width} numbers, but the model's residual is {width(self._model)} wide"
            )
        return found

    def probability(self, gate: ProbeGate, spec: SteeringSpec) -> Probability:
        """What the gate's probe says, token by token. Raises as `gate` does."""
        place = self._read_at(gate, spec)
        probe = self.probe(gate)
        sae = self.sae(probe.sae, place, probe.latents) if probe.sae else None
        return Probability(probe, sae, spec.exact, self.device(place))

    def gate(self, gate: LatentGate | NamedGate, spec: SteeringSpec) -> Fires:
        """The gate's function. Raises `InputError` for a gate above an edit, or one that was not given."""
        place = self._read_at(gate, spec)
        if isinstance(gate, LatentGate):
            return latent_exceeds(gate, self.sae(gate.sae, place, [gate.latent]), spec.exact)
        if gate.name not in self._gates:
            raise InputError(
                f"the spec wants the gate {gate.name!r}, but {', '.join(self._gates) or 'none'} was given; "
                "pass its function by name"
            )
        return self._gates[gate.name]

    def _read_at(self, gate: LatentGate | NamedGate | ProbeGate, spec: SteeringSpec) -> Hookpoint:
        """Where the gate reads."""
        place = parse_hookpoint(gate.hookpoint)
        self.device(place)
        below = [edit.hookpoint for edit in spec.edits if parse_hookpoint(edit.hookpoint).block < place.block]
        if below:
            raise InputError(
                f"the gate reads {gate.hookpoint}, which comes after the edit at {below[0]}; let it read at the same "
                "block or at a lower one"
            )
        return place


def check_gate(gate: Gate | None) -> LatentGate | NamedGate | ProbeGate | None:
    """The gate, if it can be decided while the model runs. Raises `InputError` for a `TextGate`."""
    if isinstance(gate, TextGate):
        raise InputError(
            f"the spec's gate asks {gate.classifier} about the conversation's text, which is not known here; use a "
            "verb that formats conversations (generate, chat, eval, attack, serve), or demur.text_gates.decide first"
        )
    return gate
