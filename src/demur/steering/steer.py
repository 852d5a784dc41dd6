"""`with steer(model, spec, saes):` the model runs under the spec inside the block and is itself again after it.

A sequence of specs steers each row of a batch by its own (None: not at all), as if it were alone. Works with plain
forward passes and with `generate` (greedy, sampling, beams, any cache), on a model that anyone loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from demur.errors import InputError
from demur.lm.attach import Edit as Hook
from demur.lm.attach import Step, attach_all
from demur.lm.load import LanguageModel
from demur.lm.turns import Turns, read_turns
from demur.sae.base import Sae
from demur.sae.store import LoadedSae
from demur.spec import LatentGate, NamedGate, ProbeGate, SteeringSpec
from demur.steering.artefacts import Artefacts
from demur.steering.counter import Counter, Slot
from demur.steering.edits_at import edits_at
from demur.steering.gates import Fires
from demur.steering.layer import Edits, apply
from demur.steering.positions import OWNERS
from demur.steering.rows import Rows
from demur.steering.vectors import Vector
from demur.types import Hookpoint, parse_hookpoint


class Steering:
    """What `steer` did so far: the proof that it was applied."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = counters

    def counts(self) -> list[Slot]:
        """For each edited latent or direction the tokens steered and changed, and how far, by row of the batch.

        Several batches in one `with` block add up row by row; beams and samples count for the row they come from.
        """
        return [slot for counter in self._counters for slot in counter.slots()]


@contextmanager
def steer(
    model: PreTrainedModel | LanguageModel,
    spec: SteeringSpec | Sequence[SteeringSpec | None],
    saes: Mapping[str, Sae] | Sequence[LoadedSae] = (),
    *,
    directions: Sequence[Vector] = (),
    gates: Mapping[str, Fires] | None = None,
) -> Iterator[Steering]:
    """Apply `spec` to `model` inside the block, or spec i of a sequence to row i of every batch.

    `saes`: the SAEs that the spec names by hash; those that ship with demur are found without. `directions`:
    likewise, and the probes of gates.
    `gates`: the functions of gates that the spec names. Positions in user or assistant turns need a `LanguageModel`,
    whose tokenizer knows the chat template. A spec's `system` is for whoever formats the prompt; nothing is done with
    it here. Raises `MismatchError` for an SAE or direction that is not there or has another width, `InputError` for
    a latent, hookpoint or gate that does not exist.
    """
    specs = [spec] if isinstance(spec, SteeringSpec) else [one or SteeringSpec() for one in spec]
    if not specs:
        raise InputError("no spec was given; give one, or one for each row of the batch")
    bare = model.model if isinstance(model, LanguageModel) else model
    found = Artefacts(bare, saes, directions, gates or {})
    rows = Rows(specs, found, turns_of(model, specs, found))
    edits = edits_of(specs, found, rows)
    groups = [specs.index(one) for one in specs] if len(set(specs)) > 1 else ()
    with attach_all(bare, edits.hooks, groups, rows.rests):
        yield Steering(edits.counters)


class EditsOf(NamedTuple):
    """What is to be attached for some specs."""

    hooks: dict[Hookpoint, Hook]
    counters: list[Counter]


def edits_of(specs: Sequence[SteeringSpec], found: Artefacts, rows: Rows) -> EditsOf:
    """The edits of `specs`, on the tokens that `rows` names, and what counts them. Raises as `steer` does."""
    places = rows.gated | {parse_hookpoint(edit.hookpoint) for one in specs for edit in one.edits}
    hooks: dict[Hookpoint, Hook] = {}
    counters: list[Counter] = []
    for place in sorted(places, key=lambda place: place.block):
        groups = edits_at(place, specs, found)
        counted = [Counter(group.names, str(place), group.rows) for group in groups]
        counters += counted
        hooks[place] = partial(_edit, place, rows, groups, counted)
    return EditsOf(hooks, counters)


def _edit(
    place: Hookpoint,
    rows: Rows,
    groups: Sequence[Edits],
    counters: Sequence[Counter],
    residual: Tensor,
    step: Step,
) -> Tensor:
    """The residual [batch, pos, d_model] after all edits at `place`, each of which reads it as it came."""
    on = rows.steered(place, residual, step)
    if not groups:
        return residual
    if rows.gated and rows.idle():
        for counter in counters:
            counter.none(step)
        return residual
    x = residual.reshape(-1, residual.shape[-1])
    x = x if x.dtype == groups[0].rows.dtype else x.to(groups[0].rows.dtype)
    which = rows.which(step).to(x.device)
    which = which if len(which) == 1 else which.repeat_interleave(residual.shape[1])
    flat = on.to(x.device).reshape(-1, 1)
    strength = None if rows.strength is None else rows.strength.to(x.device, x.dtype).reshape(-1, 1)
    edited = apply(groups, x, which, flat, lambda number, move: counters[number].add(move, step), strength)
    return edited.to(residual.dtype).view_as(residual)


def turns_of(model: PreTrainedModel | LanguageModel, specs: Sequence[SteeringSpec], found: Artefacts) -> Turns | None:
    """The turn marks of the model's chat template, where some spec needs them."""
    looks = [one.positions for one in specs if one.edits]
    gates = [one.gate for one in specs if one.edits]
    looks += [gate.positions for gate in gates if isinstance(gate, LatentGate | NamedGate | ProbeGate)]
    needed = [f"positions {look.where!r} need" for look in looks if look.where in OWNERS]
    probes = [gate for gate in gates if isinstance(gate, ProbeGate)]
    needed += ["a probe that reads a turn needs" for gate in probes if found.probe(gate).pool != "token"]
    needed += ["a gate's threshold in later turns needs" for gate in probes if gate.later is not None]
    if not needed:
        return None
    if not isinstance(model, LanguageModel):
        raise InputError(
            f"{needed[0]} the chat template; give steer a LanguageModel (demur.load or demur.wrap) "
            "in place of the bare model"
        )
    return read_turns(model.tokenizer)
