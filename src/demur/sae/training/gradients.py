"""Loss and gradients of one step, written out: through k of m latents they are sparse, and autograd does not know.

x^ = f W_dec + b_dec; loss = sum |x^ - x|^2 / (n d_in), which is the FVU in the units of `scale`; matryoshka takes the
mean over its prefixes. Tests hold each of these against autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from demur.parallel import Processes
from demur.sae.config import TrainConfig
from demur.sae.training import sparse
from demur.sae.training.sparse import Active


class Weights(NamedTuple):
    """An SAE while it is trained."""

    encoder: Tensor
    """[d_sae, d_in] one latent after the other."""
    b_enc: Tensor
    """[d_sae]"""
    decoder: Tensor
    """[d_sae, d_in] rows of norm one."""
    b_dec: Tensor
    """[d_in]"""
    threshold: Tensor
    """[d_sae], jumprelu; otherwise empty."""


class Step(NamedTuple):
    """What one batch says."""

    gradients: Weights
    fvu: Tensor
    """[] loss of the whole SAE on this batch, without the auxiliary parts."""
    fired: Tensor
    """[d_sae] bool"""
    active: Tensor
    """[] active latents per token."""
    smallest: Tensor
    """[] smallest activation that counted: mean over tokens (topk), of the batch (batchtopk); 0 for jumprelu."""


def preactivations(weights: Weights, x: Tensor, out: Tensor | None = None) -> Tensor:
    """(x - b_dec) encoder^T + b_enc [n, d_sae] of `x` [n, d_in], into `out` where given."""
    bias = weights.b_enc - weights.encoder @ weights.b_dec
    return torch.addmm(bias, x, weights.encoder.T, out=out)


def step(
    weights: Weights, x: Tensor, p: Tensor, dead: Tensor, guess: float, config: TrainConfig, processes: Processes
) -> Step:
    """Loss and gradients on `x` [n, d_in] with pre-activations `p` [n, d_sae].

    `dead` [d_sae] says which latents the auxiliary loss asks to explain what is left; `guess` is the last `smallest`.
    """
    if config.architecture == "jumprelu":
        found, error = _jumprelu(weights, x, p, config, processes)
    else:
        found, error = _sparse(weights, x, p, guess, config, processes)
    if config.auxk and bool(dead.any()):
        _revive(found.gradients, weights, x, p, error, dead.nonzero().flatten(), config, processes)
    gradients = found.gradients
    # p reads x - b_dec: what that costs the encoder and gives b_dec, for all parts at once
    gradients.encoder.addr_(gradients.b_enc, weights.b_dec, alpha=-1)
    gradients.b_dec.sub_(gradients.b_enc @ weights.encoder)
    return found


def _sparse(
    weights: Weights, x: Tensor, p: Tensor, guess: float, config: TrainConfig, processes: Processes
) -> tuple[Step, Tensor]:
    n, d_in = x.shape
    d_sae = len(weights.b_enc)
    active, smallest = _select(p, guess, config, processes)
    ends = config.ends
    token = active.rows
    if len(ends) > 1:
        # one block of rows for each nested group, so that one gather serves them all
        group = torch.bucketize(active.latents, torch.tensor(ends, device=x.device), right=True)
        rows, order = (group * n + active.rows).sort(stable=True)
        active = Active(rows, active.latents[order], active.values[order])
        token = rows % n
    decoded = sparse.decode(active, weights.decoder, len(ends) * n)
    parts = decoded.rows.view(len(ends), n, d_in)
    errors = parts.cumsum(0) if len(ends) > 1 else parts
    errors = errors.add_(weights.b_dec).sub_(x)
    # a latent of group g is seen by the prefixes from g on
    table = errors * (2 / (n * d_in * len(ends)))
    if len(ends) > 1:
        table = table.flip(0).cumsum(0).flip(0)
    flat = table.reshape(-1, d_in)
    wanted = decoded.gradient(flat).mul_(active.values > 0)
    ordered = sparse.by_latent(active, d_sae)
    decoder = sparse.gather(active, ordered, active.values, flat)
    encoder = sparse.gather(active._replace(rows=token), ordered, wanted, x)
    b_enc = sparse.per_latent(active, wanted, d_sae)
    error = errors[-1]
    fired = torch.zeros(d_sae, dtype=torch.bool, device=x.device)
    fired[active.latents[active.values > 0]] = True
    return (
        Step(
            Weights(encoder, b_enc, decoder, table[0].sum(0), weights.threshold.new_zeros(0)),
            error.square().sum() / (n * d_in),
            fired,
            (active.values > 0).sum() / n,
            smallest,
        ),
        error,
    )


def _select(p: Tensor, guess: float, config: TrainConfig, processes: Processes) -> tuple[Active, Tensor]:
    """The active pairs of a batch, and the smallest activation among them."""
    if config.architecture == "topk":
        active = sparse.top_k(p, config.k)
        values = active.values.view(len(p), config.k)
        return active, values.masked_fill(values <= 0, torch.inf).amin(-1).nan_to_num(posinf=0.0).mean()
    total = config.k * len(p)
    if processes.size > 1:
        # the batch is that of all processes, so each offers what could be among the largest of all
        # (the guess is where the whole batch ends, too high to hold that many of one process)
        mine = sparse.batch_top_k(p, total * processes.size, 0.0)
        offered = torch.zeros(total * processes.size, device=p.device)
        offered[: len(mine.values)] = mine.values
        limit = processes.gather(offered).topk(total * processes.size, sorted=False).values.amin()
        kept = (mine.values >= limit).nonzero().flatten()
        active = Active(mine.rows[kept], mine.latents[kept], mine.values[kept])
    else:
        active = sparse.batch_top_k(p, total, guess)
    smallest = active.values.amin() if len(active.values) else p.new_zeros(())
    return active, smallest


def _jumprelu(weights: Weights, x: Tensor, p: Tensor, config: TrainConfig, processes: Processes) -> tuple[Step, Tensor]:
    """Dense: a latent near its threshold has a gradient whether or not it is active."""
    n, d_in = x.shape
    is_active = p > weights.threshold.relu()
    latents = p * is_active
    error = torch.addmm(weights.b_dec, latents, weights.decoder).sub_(x)
    table = error * (2 / (n * d_in))
    wanted = table @ weights.decoder.T
    l0 = is_active.sum().to(p.dtype) / n
    everywhere = l0.clone()
    processes.mean_(everywhere)
    # straight-through: the step has the slope of a box of width `bandwidth` (arXiv 2407.14435, eq. 11 and 12)
    near = ((p - weights.threshold).abs() < config.bandwidth / 2).to(p.dtype)
    push = config.sparsity * 2 * (everywhere / config.k - 1) / (config.k * n)
    threshold = -((near * wanted).sum(0) * weights.threshold + near.sum(0) * push) / config.bandwidth
    wanted *= is_active
    gradients = Weights(wanted.T @ x, wanted.sum(0), latents.T @ table, table.sum(0), threshold)
    fvu = error.square().sum() / (n * d_in)
    return Step(gradients, fvu, is_active.any(0), l0, p.new_zeros(())), error


def _revive(
    gradients: Weights,
    weights: Weights,
    x: Tensor,
    p: Tensor,
    error: Tensor,
    dead: Tensor,
    config: TrainConfig,
    processes: Processes,
) -> None:
    """Add the auxiliary loss: dead latents must explain what is left. Its gradient reaches their encoder too."""
    k = min(len(dead), max(x.shape[1] // 2, 1))
    own = p[:, dead]
    if k < len(dead):
        top = own.topk(k, dim=-1, sorted=False)
        own = torch.full_like(own, -1.0).scatter_(-1, top.indices, top.values)
    latents = own.relu()
    left = error.square().sum()
    processes.mean_(left)
    rows = weights.decoder[dead]
    table = (latents @ rows).add_(error).mul_(2 * config.auxk / left.clamp(min=1e-12))
    wanted = (table @ rows.T) * (own > 0)
    gradients.decoder.index_add_(0, dead, latents.T @ table)
    gradients.encoder.index_add_(0, dead, wanted.T @ x)
    gradients.b_enc.index_add_(0, dead, wanted.sum(0))
