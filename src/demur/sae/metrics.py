"""How good an SAE is, on activations: FVU, L0, dead share, firing rates. One function each, used everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from demur.sae.base import Sae


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
    """Metrics and the firing rates behind them."""

    metrics: SaeMetrics
    firing_rate: Tensor
    """[d_sae], share of tokens on which each latent is active."""


def measure(sae: Sae, activations: Iterable[Tensor]) -> Measured:
    """Metrics of `sae` over batches of raw residuals [n, d_in], in one pass with float64 sums."""
    error = active = 0.0
    count = 0
    fired = torch.zeros(sae.d_sae, dtype=torch.float64)
    shift: Tensor | None = None
    total = torch.zeros(sae.d_in, dtype=torch.float64)
    squares = 0.0
    with torch.no_grad():
        for batch in activations:
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
            count += len(x)
    variance = squares - float(total.square().sum()) / max(count, 1)
    metrics = SaeMetrics(
        fvu=error / variance if variance > 0 else float("nan"),
        l0=active / max(count, 1),
        dead=float((fired == 0).double().mean()),
        tokens=count,
    )
    return Measured(metrics, (fired / max(count, 1)).float())
