"""How good an SAE is, on activations: FVU, L0, dead share, firing rates. One function each, used everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from demur.sae.base import Reference, Sae
from demur.sae.topk import TopKSae

_ROWS = 4096
"""Tokens encoded at once: dense latents of 4,608 take 75 MB."""


class SaeMetrics(NamedTuple):
    """Reconstruction and sparsity over a set of tokens."""

    fvu: float
    """Fraction of variance unexplained: sum |x - x^|^2 / sum |x - mean x|^2 over all tokens."""
    l0: float
    """Mean number of active latents per token."""
    dead: float
    """Share of latents active on no token of the set; depends on how many tokens there are."""
    tokens: int


class Measured(NamedTuple):
    """Metrics, and what each latent did."""

    metrics: SaeMetrics
    reference: Reference


def measure(sae: Sae, activations: Iterable[Tensor]) -> Measured:
    """Metrics of `sae` over batches of raw residuals [n, d_in], in one pass with float64 sums."""
    error = active = 0.0
    count = 0
    fired = torch.zeros(sae.d_sae, dtype=torch.float64)
    shift: Tensor | None = None
    total = torch.zeros(sae.d_in, dtype=torch.float64)
    squares = threshold = 0.0
    largest = torch.zeros(sae.d_sae)
    sums = torch.zeros(2, sae.d_sae, dtype=torch.float64)
    with torch.no_grad():
        for batch in (part for whole in activations for part in whole.split(_ROWS)):
            x = batch.to(sae.W_dec.device, torch.float32)
            prepared = sae.prepare(x)
            latents = sae.encode_prepared(prepared.x)
            difference = x - prepared.restore(sae.decode(latents)).float()
            # sums about the first batch's mean: massive means must not eat the variance's digits
            shift = x.mean(0) if shift is None else shift
            centred = (x - shift).cpu().double()
            error += float(difference.cpu().double().square().sum())
            total += centred.sum(0)
            squares += float(centred.square().sum())
            counts = (latents > 0).sum(0).cpu()
            active += float(counts.sum())
            fired += counts.double()
            largest = torch.maximum(largest, latents.amax(0).cpu().float())
            sums += torch.stack([f.sum(0, dtype=torch.float64) for f in (latents, latents.square())]).cpu()
            if isinstance(sae, TopKSae):
                threshold += float(latents.masked_fill(latents <= 0, torch.inf).amin(-1).double().sum())
            count += len(x)
    variance = squares - float(total.square().sum()) / max(count, 1)
    metrics = SaeMetrics(
        fvu=error / variance if variance > 0 else float("nan"),
        l0=active / max(count, 1),
        dead=float((fired == 0).double().mean()),
        tokens=count,
    )
    mean, square = sums / max(count, 1)
    reference = Reference(
        max_act=largest,
        sigma=(square - mean.square()).clamp(min=0).sqrt().float(),
        rate=(fired / max(count, 1)).float(),
        threshold=torch.tensor(threshold / max(count, 1)),
    )
    return Measured(metrics, reference)
