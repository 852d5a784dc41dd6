"""What a spec is set beside to learn where its damage comes from: parts of it, less of it, and other pushes as long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from demur.eval.observe import ANSWER, FIRST
from demur.features.controls import control_latent, matched_latents
from demur.results import WhyKind
from demur.sae.base import Sae
from demur.spec import DirectionEdit, Edit, Positions, SteeringSpec, Where

BASE, BARE = "base", "bare"
"""Views of the prompts: under the usual system prompt, and under the chat template's own."""
_STEERED_TYPES = ("template", "system", "user", ANSWER, "text")
"""Types whose tokens are steered alone, or alone left out."""
_ONLY: dict[str, Where] = {"template": "template", "user": "user", ANSWER: "generation"}
"""Positions of a spec that steers these tokens alone."""


@dataclass(frozen=True)
class Intervention:
    """One thing that is done to the model, and what it is measured against."""

    key: str
    kind: WhyKind
    label: str
    spec: SteeringSpec
    dose: float = 1.0
    only: frozenset[str] | None = None
    """Types of tokens that may move; None for all that the spec steers."""
    view: str = BASE
    """How the steered model reads the prompts."""
    base: str = BASE
    """How the unsteered one reads them."""
    full: bool = False
    """Everything is measured; else KL of answers and refusing only."""
    asked: SteeringSpec | None = None
    """What answers are generated under; None: none are."""
    prompts: bool = False
    """Also KL at the tokens of prompts, which takes as long again as all the rest."""


def at_dose(spec: SteeringSpec, dose: float) -> SteeringSpec | None:
    """The spec with `dose` times the values of its edits; a factor goes that part of the way from 1. None where an edit
    knows no more or less (project_out, ablate) or would leave what its op allows."""
    if dose == 1:
        return spec
    edits: list[Edit | DirectionEdit] = []
    for edit in spec.edits:
        if edit.op in ("project_out", "ablate"):
            return None
        value = 1 + (edit.value - 1) * dose if edit.op == "scale" else edit.value * dose
        if edit.op == "scale" and value < 0:
            return None
        edits.append(replace(edit, value=value))
    return replace(spec, edits=tuple(edits))


def identity(spec: SteeringSpec) -> SteeringSpec | None:
    """The spec that only puts the SAE's reconstruction in the residual's place, on the tokens that `spec` steers.

    None for a spec without an SAE, or with two at one hookpoint, of which only one could reconstruct it.
    """
    first: dict[str, Edit] = {}
    for edit in spec.edits:
        if isinstance(edit, Edit) and edit.sae != first.setdefault(edit.hookpoint, edit).sae:
            return None
    if not first:
        return None
    edits = tuple(Edit(place, edit.sae, edit.latents[:1], 1.0, "scale") for place, edit in first.items())
    return replace(spec, edits=edits, mode="reconstruct")


def edited_latents(spec: SteeringSpec) -> list[tuple[str, str, int]]:
    """(hookpoint, SAE, latent) of all edits, in order; empty where an edit goes along a raw direction."""
    if not all(isinstance(edit, Edit) for edit in spec.edits):
        return []
    found = ((e.hookpoint, e.sae, latent) for e in spec.edits if isinstance(e, Edit) for latent in e.latents)
    return list(dict.fromkeys(found))


def with_latents(spec: SteeringSpec, others: Mapping[int, int], saes: Mapping[str, Sae]) -> SteeringSpec:
    """The spec with other latents in place of its own, set to the same values in latent units."""
    edits: list[Edit | DirectionEdit] = []
    for edit in spec.edits:
        assert isinstance(edit, Edit)
        values = saes[edit.sae].in_units(edit.latents, edit.value, edit.unit).tolist()
        for latent, value in zip(edit.latents, values, strict=True):
            # a factor, and no value at all, have no unit
            own = edit.value if edit.op in ("scale", "ablate") else value
            edits.append(replace(edit, latents=(others[latent],), value=own, unit="latent"))
    return replace(spec, edits=tuple(edits))


def choose_controls(
    sae: Sae, latents: Sequence[int], harmless: Tensor, harmful: Tensor, n: int, generator: torch.Generator
) -> list[list[int]]:
    """Up to `n` choices of a control for each of `latents`: unrelated latents that fire about as often.

    `harmless`, `harmful` [d_sae]: firing rates. Those that fire more on harmful text are no controls. The first
    choice is the one nearest in firing rate, the others are drawn among those near in rate and decoder norm. Raises as
    `control_latent` does.
    """
    related = [*latents, *torch.nonzero(harmful > harmless).flatten().tolist()]
    norms = sae.W_dec.detach().float().norm(dim=1).cpu()
    columns = []
    for latent in latents:
        nearest = control_latent(harmless, latent, related, harmful)
        related.append(nearest)
        drawn = matched_latents(harmless, norms, latent, related, n - 1, generator) if n > 1 else []
        related += drawn
        columns.append([nearest, *drawn])
    return [list(row) for row in zip(*columns, strict=False)]


def parts(spec: SteeringSpec, view: str = BASE) -> list[Intervention]:
    """The spec, its reconstruction, its clamp, and what becomes of it with the first token or by kinds of tokens."""
    found = [Intervention("edit", "edit", "the edit", spec, view=view, full=True, prompts=True, asked=spec)]

    def add(kind: WhyKind, label: str, other: SteeringSpec) -> None:
        found.append(Intervention(kind, kind, label, other, view=view, full=True))

    if alone := identity(spec):
        if spec.mode == "reconstruct":
            add("preserving", "the edit with the SAE's error kept", replace(spec, mode="error_preserving"))
        else:
            add("reconstructed", "the edit in the SAE's reconstruction", replace(spec, mode="reconstruct"))
        add("reconstruction", "reconstruction alone", alone)
    if spec.skip_first:
        add("sink", "the edit, first token too", replace(spec, skip_first=False))
    everywhere = spec.positions == Positions()
    every = frozenset((FIRST, "assistant", *_STEERED_TYPES))
    for kind in _STEERED_TYPES:
        only = Intervention(f"only {kind}", "only", f"only {kind} tokens", spec, 1.0, frozenset({kind}), view)
        but = Intervention(f"but {kind}", "but", f"all but {kind} tokens", spec, 1.0, every - {kind}, view)
        if everywhere and kind in _ONLY:
            only = replace(only, asked=replace(spec, positions=Positions(_ONLY[kind])))
        if everywhere and kind == ANSWER:
            but = replace(but, asked=replace(spec, positions=Positions("prompt")))
        found += [only, but]
    return found


def ladder(one: Intervention, doses: Sequence[float]) -> list[Intervention]:
    """`one` at each of `doses`, as far as it has doses; the whole dose keeps its key."""
    found = []
    for dose in doses:
        spec = at_dose(one.spec, dose)
        if spec is not None:
            key = one.key if dose == 1 else f"{one.key} x {dose:g}"
            asked = None if one.asked is None else spec
            full, prompts = one.full and dose == 1, one.prompts and dose == 1
            found.append(replace(one, key=key, spec=spec, dose=dose, full=full, prompts=prompts, asked=asked))
    return found
