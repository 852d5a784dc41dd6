"""The slow, obvious definition of an edit, in float64: encode all, change the code, decode, add the SAE's error back.

The engine never works like this; `demur verify` and the tests compare it with this.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from demur.sae.base import Sae
from demur.sae.topk import TopKSae
from demur.spec import DirectionEdit, Edit, Op, SteeringSpec
from demur.steering.direction import Direction
from demur.steering.vectors import Vector
from demur.types import Hookpoint, parse_hookpoint

_CLOSE = 1e-4
"""Relative distance from the k-th pre-activation below which single precision cannot tell the rank."""


class Expected(NamedTuple):
    """What a residual becomes."""

    residual: Tensor
    """[n, d_model] float64"""
    decidable: Tensor
    """[n] bool: False where a latent's rank is too close to call in single precision."""


def expected(
    x: Tensor, spec: SteeringSpec, place: Hookpoint, saes: Mapping[str, Sae], directions: Sequence[Vector] = ()
) -> Expected:
    """Residuals `x` [n, d_model] after all edits of `spec` at `place`, each of which reads `x` as it came."""
    x = x.double()
    total = torch.zeros_like(x)
    decidable = torch.ones(len(x), dtype=torch.bool, device=x.device)
    here = [edit for edit in spec.edits if parse_hookpoint(edit.hookpoint) == place]
    through = [edit for edit in here if isinstance(edit, Edit)]
    for name in dict.fromkeys(edit.sae for edit in through):
        sae = copy.deepcopy(saes[name]).to(x.device).double()
        prepared = sae.prepare(x)
        f = sae.encode_prepared(prepared.x)
        error = x - prepared.restore(sae.decode(f))
        changed = f.clone()
        for edit in through:
            if edit.sae == name:
                for latent, value in zip(edit.latents, sae.in_units(edit.latents, edit.value, edit.unit), strict=True):
                    changed[:, latent] = _changed(edit.op, f[:, latent], float(value))
                    decidable &= _rank_is_clear(sae, prepared.x, latent)
        kept = 0 if spec.mode == "reconstruct" else error
        total += prepared.restore(sae.decode(changed)) + kept - x
    known = {one.hash: one for one in directions if isinstance(one, Direction)}
    for along in [edit for edit in here if isinstance(edit, DirectionEdit)]:
        direction = known[along.direction]
        unit = torch.nn.functional.normalize(direction.vector.to(x.device).double(), dim=0)
        if along.op == "add":
            total += along.value * direction.length(along.unit) * unit
        else:
            total -= (x @ unit).unsqueeze(-1) * unit
    return Expected(x + total, decidable)


def _changed(op: Op, f: Tensor, value: float) -> Tensor:
    if op == "clamp":
        return torch.full_like(f, value)
    if op == "floor":
        return f.clamp(min=value)
    if op == "ceil":
        return f.clamp(max=value)
    if op == "add":
        return f + value
    return value * f if op == "scale" else torch.zeros_like(f)


def _rank_is_clear(sae: Sae, x: Tensor, latent: int) -> Tensor:
    if not isinstance(sae, TopKSae):
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    p = sae.preactivations(x)
    others = p.clone()
    others[:, latent] = -torch.inf
    # the latent is active if it exceeds the k-th largest of the others
    limit = others.topk(sae.k, dim=-1).values[:, -1] if sae.k < sae.d_sae else torch.full_like(p[:, 0], -torch.inf)
    return (p[:, latent] - limit).abs() > _CLOSE * (1 + limit.abs())
