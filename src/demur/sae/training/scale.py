"""The units an SAE is trained in: residuals centred and scaled to a mean squared norm of d_in."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from demur.errors import InputError

_WEISZFELD = 100
"""Iterations at most; dictionary_learning takes as many."""


class Scale(NamedTuple):
    """How raw residuals are brought to the units that an SAE is trained in: (x - mean) * factor."""

    mean: Tensor
    """[d_in] mean, or geometric median."""
    factor: float
    """sqrt(d_in) over the root mean squared norm of centred residuals."""


def fit_scale(sample: Tensor, center: Literal["mean", "median"] = "mean") -> Scale:
    """Scale from a sample of residuals [n, d_in]. Raises `InputError` where they do not vary or are not finite."""
    if not bool(torch.isfinite(sample).all()):
        raise InputError("the activations hold NaN or infinity; harvest in another dtype")
    middle = sample.mean(0) if center == "mean" else _geometric_median(sample)
    norm = float((sample - middle).square().sum(-1).mean().sqrt())
    if not norm > 0:
        raise InputError("the activations do not vary, so no SAE can be trained on them; give other text")
    return Scale(middle, sample.shape[1] ** 0.5 / norm)


def _geometric_median(sample: Tensor) -> Tensor:
    """The point with the least sum of distances, by Weiszfeld's iterations."""
    guess = sample.mean(0)
    for _ in range(_WEISZFELD):
        weight = 1 / (sample - guess).norm(dim=-1).clamp(min=1e-8)
        better = (weight @ sample) / weight.sum()
        moved = float((better - guess).norm())
        guess = better
        if moved <= 1e-6 * float(guess.norm()):
            break
    return guess
