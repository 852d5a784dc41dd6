"""Which tokens of which rows a pass steers: each row by its own spec's positions and gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from demur.errors import InputError
from demur.lm.attach import Step
from demur.lm.turns import Turns
from demur.spec import LatentGate, NamedGate, Positions, SteeringSpec
from demur.steering.artefacts import Artefacts
from demur.steering.gates import GateState
from demur.steering.positions import TurnReader, chosen
from demur.types import Hookpoint, parse_hookpoint


class _Gate:
    """One gate, the specs that have it, and its state."""

    def __init__(self, gate: LatentGate | NamedGate, spec: SteeringSpec, found: Artefacts) -> None:
        self.place = parse_hookpoint(gate.hookpoint)
        self.looks = (gate.positions, spec.skip_first)
        self.state = GateState(found.gate(gate, spec))
        self.specs: list[int] = []
        self.blind = gate.positions.where in ("prompt", "last_prompt_token", "user")
        """Reads nothing that the model wrote, so that beams may be swapped under it."""


class Rows:
    """The specs of a batch, and what is steered in the pass at hand."""

    def __init__(
        self, specs: Sequence[SteeringSpec], found: Artefacts, turns: Turns | None, before: Rows | None = None
    ) -> None:
        """`before`: what was attached until now, whose gates and turns go on as they stand."""
        self._specs = specs
        self._of: Tensor | None = None
        self._turns = TurnReader(turns) if turns else None
        if before is not None:
            self._turns = before._turns or self._turns
        self._owner: Tensor | None = None
        self._kinds = list(dict.fromkeys((one.positions, one.skip_first) for one in specs))
        self._kind = torch.tensor([self._kinds.index((one.positions, one.skip_first)) for one in specs])
        self._gates: dict[tuple[object, bool, bool], _Gate] = {}
        for number, spec in enumerate(specs):
            if spec.gate is not None and spec.edits:
                key = (spec.gate, spec.skip_first, spec.exact)
                if key not in self._gates:
                    self._gates[key] = _Gate(spec.gate, spec, found)
                    if before is not None and key in before._gates:
                        self._gates[key].state = before._gates[key].state
                self._gates[key].specs.append(number)
        self._pass: Step | None = None
        self._on = torch.empty(0)

    def slots(self, of: Tensor) -> None:
        """Row r of a pass has the spec `of[r]` [slots], in place of spec i for row i; it may be changed on the way."""
        self._of = of

    @property
    def gated(self) -> set[Hookpoint]:
        """Where gates read."""
        return {gate.place for gate in self._gates.values()}

    def which(self, step: Step) -> Tensor:
        """[batch], or [1] for one spec: which spec each row of the pass has."""
        if len(self._specs) == 1:
            return torch.zeros(1, dtype=torch.long, device=step.origin.device)
        if self._of is not None:
            return self._of[step.rows[: len(step.positions)]]
        if step.given != len(self._specs):
            raise InputError(
                f"{len(self._specs)} specs were given, one for each row, but the batch has {step.given} rows"
            )
        return step.origin[: len(step.positions)]

    def steered(self, place: Hookpoint, residual: Tensor, step: Step) -> Tensor:
        """[batch, pos] bool: positions allow it and every gate up to `place` is open. Reads the gates at `place`."""
        if self._pass is not step:
            self._begin(step)
        for gate in self._gates.values():
            if gate.place == place:
                opened = gate.state.read(residual, step, self._chosen(gate.looks, step))
                if len(self._specs) > 1:
                    others = ~torch.isin(self.which(step), torch.tensor(gate.specs, device=opened.device))
                    opened = opened | others.unsqueeze(1)
                self._on = self._on & opened
        return self._on

    def _begin(self, step: Step) -> None:
        if step.beams and not all(gate.blind for gate in self._gates.values()):
            raise InputError(
                "a gate that reads what the model writes cannot follow beams, which are swapped on the way; "
                "give it positions prompt, or use num_beams=1"
            )
        if self._turns is not None:
            if step.ids is None:
                raise InputError("positions in turns need token ids, but the model was called with embeddings")
            self._owner = self._turns.read(step)
        masks = [self._chosen(kind, step) for kind in self._kinds]
        if len(masks) == 1:
            self._on = masks[0]
        else:
            kind = self._kind.to(step.positions.device)[self.which(step)]
            self._on = torch.stack(masks)[kind, torch.arange(len(kind), device=kind.device)]
        self._pass = step

    def _chosen(self, looks: tuple[Positions, bool], step: Step) -> Tensor:
        positions, skip_first = looks
        found = chosen(positions, step, self._owner)
        return found & (step.positions > 0) if skip_first else found
