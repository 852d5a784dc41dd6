"""What a spec names by hash or name, found and checked against the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from demur.errors import InputError, MismatchError
from demur.lm.hookpoints import device_at, width
from demur.sae.base import Sae
from demur.sae.store import LoadedSae, embedded_sae
from demur.spec import LatentGate, NamedGate, SteeringSpec
from demur.steering.direction import Direction
from demur.steering.gates import Fires, latent_exceeds
from demur.types import Hookpoint, parse_hookpoint


class Artefacts:
    """SAEs, directions and gate functions for a model; each is checked when it is asked for."""

    def __init__(
        self,
        model: PreTrainedModel,
        saes: Mapping[str, Sae] | Sequence[LoadedSae],
        directions: Sequence[Direction],
        gates: Mapping[str, Fires],
    ) -> None:
        self._model = model
        self._saes = dict(saes) if isinstance(saes, Mapping) else {loaded.hash: loaded.sae for loaded in saes}
        self._directions = {direction.hash: direction for direction in directions}
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

    def gate(self, gate: LatentGate | NamedGate, spec: SteeringSpec) -> Fires:
        """The gate's function. Raises `InputError` for a gate above an edit, or one that was not given."""
        place = parse_hookpoint(gate.hookpoint)
        self.device(place)
        below = [edit.hookpoint for edit in spec.edits if parse_hookpoint(edit.hookpoint).block < place.block]
        if below:
            raise InputError(
                f"the gate reads {gate.hookpoint}, which comes after the edit at {below[0]}; let it read at the same "
                "block or at a lower one"
            )
        if isinstance(gate, LatentGate):
            return latent_exceeds(gate, self.sae(gate.sae, place, [gate.latent]), spec.exact)
        if gate.name not in self._gates:
            raise InputError(
                f"the spec wants the gate {gate.name!r}, but {', '.join(self._gates) or 'none'} was given; "
                "pass its function by name"
            )
        return self._gates[gate.name]
