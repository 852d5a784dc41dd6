"""Which tokens of which rows a pass steers: each row by its own spec's positions and gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from demur.errors import InputError
from demur.lm.attach import Step
from demur.lm.turns import Turns
from demur.spec import LatentGate, NamedGate, Positions, ProbeGate, SteeringSpec
from demur.steering.artefacts import Artefacts, check_gate
from demur.steering.gates import GateState
from demur.steering.positions import OWNERS, TurnReader, chosen, strength
from demur.types import Hookpoint, parse_hookpoint

_WRITTEN = Positions("generation")


class _Gate:
    """One gate, the specs that have it, and its state."""

    def __init__(self, gate: LatentGate | NamedGate | ProbeGate, spec: SteeringSpec, found: Artefacts) -> None:
        self.place = parse_hookpoint(gate.hookpoint)
        self._looks = (gate.positions, spec.skip_first)
        self.state = GateState()
        self.specs: list[int] = []
        self._probe = gate if isinstance(gate, ProbeGate) else None
        if isinstance(gate, ProbeGate):
            self.probability = found.probability(gate, spec)
        else:
            self._fires = found.gate(gate, spec)
        self.monitors = self._probe is not None and self._probe.monitor < 1
        self.soft = self._probe is not None and self._probe.strength == "probability"
        """May open in part."""
        self.blind = gate.positions.where in ("prompt", "last_prompt_token", "user") and not self.monitors
        """Reads nothing that the model wrote, so that beams may be swapped under it."""
        self.prompt_only = gate.positions.where in ("prompt", "last_prompt_token") and not self.monitors
        """Once the model writes, it stays as it is."""

    def continue_from(self, other: _Gate) -> None:
        """Go on as the same gate stood."""
        self.state = other.state
        if self._probe is not None:
            self.probability = other.probability

    def read(self, residual: Tensor, step: Step, rows: Rows) -> Tensor:
        """[batch, pos] how far it is open at each token."""
        if self.prompt_only and rows.written:  # there is nothing left to decide
            return self.state.now(step).expand(-1, residual.shape[1])
        at = rows.chosen(self._looks, step)
        if self._probe is None:
            return self.state.read(self._fires(residual, step).to(at.device) & at, step)
        p = self.probability.read(residual, step, rows.owner).to(at.device)
        fired = at & (p > self._threshold(self._probe, rows.spoken, at.device))
        if self.monitors:
            fired |= chosen(_WRITTEN, step) & (p > self._probe.monitor)
        return self.state.read(fired * p if self.soft else fired, step)

    def _threshold(self, gate: ProbeGate, spoken: Tensor | None, device: torch.device) -> float | Tensor:
        """The probability at which it opens; [batch, pos] where it is another one in later turns."""
        if gate.later is None:
            return gate.threshold
        assert spoken is not None
        return torch.where(spoken, gate.later, gate.threshold).to(device)


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
        self.owner: Tensor | None = None
        """[batch, pos] whose text each token of the pass is, where some spec needs it."""
        self.spoken: Tensor | None = None
        """[batch, pos] bool, likewise: it is the assistant's, or one before it was."""
        self.written = False
        """The pass is of tokens that the model wrote, and of no others; known where there are gates."""
        kinds = [(one.positions, one.skip_first, bool(one.edits)) for one in specs]
        self._kinds = list(dict.fromkeys(kinds))
        self._kind = torch.tensor([self._kinds.index(kind) for kind in kinds])
        self._fades = any(one.positions.half_life for one in specs)
        self._gates: dict[tuple[object, bool, bool], _Gate] = {}
        for number, spec in enumerate(specs):
            if (gate := check_gate(spec.gate if spec.edits else None)) is not None:
                key = (gate, spec.skip_first, spec.exact)
                if key not in self._gates:
                    self._gates[key] = _Gate(gate, spec, found)
                    if before is not None and key in before._gates:
                        self._gates[key].continue_from(before._gates[key])
                self._gates[key].specs.append(number)
        self.gated = {gate.place for gate in self._gates.values()}
        """Where gates read."""
        looks = [one.positions for one in specs if one.edits]
        self._settles = (
            bool(self._gates)
            and all(gate.prompt_only for gate in self._gates.values())
            and all(look.every == 1 and look.where not in OWNERS for look in looks)
        )
        """Once the model writes, a row that is left as it is at one token is so at all that follow."""
        self._pass: Step | None = None
        self._idle: bool | None = None
        """As `idle` says; None: not looked at since the last gate was read."""
        self._on = torch.empty(0)
        self.strength: Tensor | None = None
        """[batch, pos] the share of their way that edits move residuals: what a half-life and the gates read so far
        leave of it; None: all of it."""

    def slots(self, of: Tensor) -> None:
        """Row r of a pass has the spec `of[r]` [slots], in place of spec i for row i; it may be changed on the way."""
        self._of = of

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
                opened = gate.read(residual, step, self)
                if len(self._specs) > 1:
                    others = ~torch.isin(self.which(step), torch.tensor(gate.specs, device=opened.device))
                    opened = opened.masked_fill(others.unsqueeze(1), 1.0)
                self._on, self._idle = self._on & (opened > 0), None
                if gate.soft:
                    self.strength = opened if self.strength is None else self.strength * opened
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
            self.owner, self.spoken = self._turns.read(step)
        on = [self.chosen((at, skip), step) & edits for at, skip, edits in self._kinds]
        self._on, self._idle = self._by_kind(on, step), None
        self.strength = None
        self.written = bool(
            self._gates and not step.fresh and (step.positions >= step.prompt_lengths.unsqueeze(1)).all()
        )
        if self._fades:
            self.strength = self._by_kind([strength(positions, step) for positions, *_ in self._kinds], step)
        self._pass = step

    def idle(self) -> bool:
        """Nothing is steered in the pass, by the gates read so far."""
        if self._idle is None:
            self._idle = not bool(self._on.any())
        return self._idle

    def rests(self, ids: Tensor | None) -> bool:
        """Whether nothing is steered in a pass of token `ids` [batch, pos], with which the rows of the last one go on.

        If so it need not be told of the pass in any other way.
        """
        if not (self._settles and self.written and self.idle()):
            return False
        if self._turns is not None:
            if ids is None:
                return False
            self._turns.put_off(ids)
        return True

    def _by_kind(self, found: Sequence[Tensor], step: Step) -> Tensor:
        """[batch, pos] of what was `found` for each kind of positions, the row's own."""
        if len(found) == 1:
            return found[0]
        kind = self._kind.to(step.positions.device)[self.which(step)]
        return torch.stack(list(found))[kind, torch.arange(len(kind), device=kind.device)]

    def chosen(self, looks: tuple[Positions, bool], step: Step) -> Tensor:
        """[batch, pos] bool: tokens at these positions, perhaps without the first one."""
        positions, skip_first = looks
        found = chosen(positions, step, self.owner)
        return found & (step.positions > 0) if skip_first else found
