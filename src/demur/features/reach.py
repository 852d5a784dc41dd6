"""Which tokens a spec steers, and how far, where prompts are read once and lie side by side (`demur.lm.packed`).

A gate that looks at the last token of the prompt reads what no edit has touched yet, as it may not lie above one. So it
is decided once, by the engine's own code on the prompt alone, for a row of any answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from demur.errors import InputError
from demur.lm.attach import Step
from demur.lm.batches import Row, pad
from demur.lm.load import LanguageModel
from demur.lm.packed import Pack
from demur.lm.score import read_padded
from demur.spec import NamedGate, Positions, ProbeGate, SteeringSpec, TextGate
from demur.steering.artefacts import Artefacts
from demur.steering.positions import OWNERS, chosen, strength
from demur.steering.rows import Rows
from demur.steering.steer import turns_of
from demur.types import Hookpoint, parse_hookpoint

_TOGETHER = 16
"""Prompts read in one pass."""


def check_reach(spec: SteeringSpec) -> None:
    """Raise `InputError` unless what `spec` steers follows from the prompt and each token's place alone."""
    if spec.positions.where in OWNERS:
        raise InputError(
            f"positions {spec.positions.where!r} depend on whose text a token is, which is not followed where prompts "
            "lie side by side; use all, prompt, last_prompt_token or generation"
        )
    gate = spec.gate
    if gate is None:
        return
    if isinstance(gate, NamedGate | TextGate) or gate.positions != Positions("last_prompt_token"):
        raise InputError(
            "the spec's gate does not look at the last token of the prompt alone, and only such a one is followed "
            "where prompts lie side by side; give it the positions last_prompt_token"
        )
    if isinstance(gate, ProbeGate) and gate.monitor < 1:
        raise InputError("the spec's gate monitors what the model writes, which is not there yet; leave monitor out")


class Reach(NamedTuple):
    """What specs steer of a pack."""

    on: Tensor
    """[specs, width] bool."""
    strength: Tensor | None
    """[specs, width] the share of their way that edits go; None: all of it."""


class Gates:
    """How far gates open at the last token of prompts. What they read is computed once for each place and prompts."""

    def __init__(self, lm: LanguageModel, found: Artefacts) -> None:
        self._lm, self._found = lm, found
        self._read: dict[tuple[Hookpoint, tuple[tuple[int, ...], ...]], list[tuple[Tensor, Step]]] = {}

    def opened(self, spec: SteeringSpec, prompts: Sequence[Row]) -> Tensor:
        """[prompts] from 0, shut, to 1; 1 for a spec without a gate. Raises as `check_reach` and `steer` do."""
        check_reach(spec)
        if spec.gate is None:
            return torch.ones(len(prompts))
        assert not isinstance(spec.gate, TextGate)
        everywhere = replace(spec, positions=Positions(), skip_first=False)
        place = parse_hookpoint(spec.gate.hookpoint)
        found = []
        for residual, step in self._readings(place, prompts):
            rows = Rows([everywhere], self._found, turns_of(self._lm, [everywhere], self._found))
            on = rows.steered(place, residual, step)[:, -1].float()
            found.append((on if rows.strength is None else on * rows.strength[:, -1]).cpu())
        return torch.cat(found)

    def reach(self, one: Pack, specs: Sequence[SteeringSpec]) -> Reach:
        """What each of `specs` steers of the texts of `one`."""
        device = one.ids.device
        texts = one.text_of.clamp(min=0)  # what all texts begin with is prompt in any of them
        ends = torch.tensor([len(text.prompt) for text in one.texts], device=device)[texts]
        # each token as a row of its own, which has the prompt length of its text
        each = torch.arange(len(texts), device=device)
        at = one.positions.reshape(-1, 1)
        step = Step(at, ends, each, each, len(each), len(each), beams=False, fresh=True, ids=None)
        on, share = [], []
        for spec in specs:
            check_reach(spec)
            here = chosen(spec.positions, step)[:, 0]
            if spec.skip_first:
                here = here & (at[:, 0] > 0)
            far = strength(spec.positions, step)[:, 0]
            if spec.gate is not None:
                opened = self.opened(spec, [text.prompt for text in one.texts]).to(device)[texts]
                far = far * opened.masked_fill((one.text_of < 0) | (at[:, 0] < ends - 1), 0.0)
                here = here & (far > 0)
            on.append(here)
            share.append(far)
        far = torch.stack(share)
        return Reach(torch.stack(on), None if bool((far == 1).all()) else far)

    def _readings(self, place: Hookpoint, prompts: Sequence[Row]) -> list[tuple[Tensor, Step]]:
        key = place, tuple(tuple(row) for row in prompts)
        if key not in self._read:
            self._read[key] = [
                self._reading(place, prompts[at : at + _TOGETHER]) for at in range(0, len(prompts), _TOGETHER)
            ]
        return self._read[key]

    def _reading(self, place: Hookpoint, prompts: Sequence[Row]) -> tuple[Tensor, Step]:
        padded = pad(self._lm, prompts, side="left")
        residual = read_padded(self._lm, place, padded).residual
        each = torch.arange(len(prompts), device=padded.ids.device)
        positions = (padded.mask.cumsum(-1) - 1).masked_fill(padded.mask == 0, -1)
        lengths = padded.mask.sum(-1)
        step = Step(positions, lengths, each, each, len(each), len(each), beams=False, fresh=True, ids=padded.ids)
        return residual, step
