"""Products with the few active latents of each token, in place of dense matrices with zeros in them.

A step of training needs five products with the latents. Only the encoder's own is dense; through k of m latents the
other four (decode, the gradients of the activations, of the decoder and of the encoder) touch k/m of the numbers.
Every product here gathers rows with `embedding_bag`, which runs on CPU and CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_GROUP = 16


class Active(NamedTuple):
    """(token, latent) pairs that are active, in the order of `rows`."""

    rows: Tensor
    """[pairs] int64, ascending: which row of the error table each pair sees (the token; see `loss.sparse_step`)."""
    latents: Tensor
    """[pairs] int64"""
    values: Tensor
    """[pairs] activations, >= 0."""


class ByLatent(NamedTuple):
    """The same pairs, in the order of latents: how gradients of weights gather the rows of tokens."""

    order: Tensor
    """[pairs] which pair comes where."""
    starts: Tensor
    """[d_sae] where the pairs of each latent begin."""


def starts(sorted_keys: Tensor, n: int) -> Tensor:
    """Where each of the keys 0..n-1 begins in `sorted_keys` [pairs]: [n] int64."""
    counts = torch.bincount(sorted_keys, minlength=n)
    return counts.cumsum(0) - counts


def by_latent(active: Active, d_sae: int) -> ByLatent:
    """Order the pairs of `active` by latent; pairs of one latent keep their order."""
    # few bits sort several times faster on a CPU
    key = active.latents.to(torch.int16) if d_sae <= torch.iinfo(torch.int16).max else active.latents.to(torch.int32)
    order = torch.argsort(key, stable=True)
    return ByLatent(order, starts(active.latents, d_sae))


class Decoded(NamedTuple):
    """What active latents reconstruct."""

    rows: Tensor
    """[n_rows, d_in] sum over the pairs of each row of value x decoder row."""
    gradient: Callable[[Tensor], Tensor]
    """From the gradient of `rows` to that of the values [pairs]: decoder row . gradient row for each pair. Once."""


def decode(active: Active, decoder: Tensor, n_rows: int) -> Decoded:
    """Decode `active` with `decoder` [d_sae, d_in]. No gradient for the decoder: `gather` is much faster."""
    values = active.values.detach().requires_grad_()
    with torch.enable_grad():
        out = F.embedding_bag(
            active.latents, decoder.detach(), starts(active.rows, n_rows), per_sample_weights=values, mode="sum"
        )

    def gradient(table: Tensor) -> Tensor:
        return torch.autograd.grad(out, values, table)[0]

    return Decoded(out.detach(), gradient)


def gather(active: Active, ordered: ByLatent, weights: Tensor, table: Tensor) -> Tensor:
    """sum over the pairs of each latent of weight x table row: [d_sae, d_in]. `weights` is [pairs]."""
    return F.embedding_bag(
        active.rows[ordered.order], table, ordered.starts, per_sample_weights=weights[ordered.order], mode="sum"
    )


def per_latent(active: Active, weights: Tensor, d_sae: int) -> Tensor:
    """sum over the pairs of each latent of weight: [d_sae]."""
    return weights.new_zeros(d_sae).index_add_(0, active.latents, weights)


def top_k(p: Tensor, k: int) -> Active:
    """The k largest of each row of pre-activations `p` [n, d_sae], after ReLU."""
    top = _top(p, k)
    rows = torch.arange(len(p), device=p.device).repeat_interleave(k)
    return Active(rows, top.indices.flatten(), top.values.flatten().relu_())


class _Top(NamedTuple):
    values: Tensor
    indices: Tensor


def _top(p: Tensor, k: int) -> _Top:
    """`p.topk(k)`, in any order. On a CPU in two rounds, which is faster: the k largest lie in the k groups of latents
    whose largest members are largest."""
    n, d_sae = p.shape
    if p.device.type != "cpu" or d_sae % _GROUP or d_sae < 2 * k * _GROUP:
        found = p.topk(k, dim=-1, sorted=False)
        return _Top(found.values, found.indices)
    groups = d_sae // _GROUP
    best = F.max_pool1d(p, _GROUP).topk(k, dim=-1, sorted=False).indices
    first = torch.arange(0, n * groups, groups).unsqueeze(1)
    candidates = F.embedding((best + first).flatten(), p.view(n * groups, _GROUP)).view(n, k * _GROUP)
    top = candidates.topk(k, dim=-1, sorted=False)
    return _Top(top.values, best.gather(1, top.indices // _GROUP) * _GROUP + top.indices % _GROUP)


def batch_top_k(p: Tensor, total: int, guess: float) -> Active:
    """The `total` largest of all of `p` [n, d_sae], those that are positive (Bussmann et al., arXiv 2412.06410).

    `guess` is a value near the smallest of them; it saves looking at the rest and changes no result.
    """
    flat = p.flatten()
    chosen = (flat > max(guess, 0.0)).nonzero().flatten()
    if len(chosen) < total and guess > 0:
        chosen = (flat > 0).nonzero().flatten()
    values = flat[chosen]
    if len(chosen) > total:
        kept = values.topk(total, sorted=False).indices.sort().values
        chosen, values = chosen[kept], values[kept]
    return Active(chosen // p.shape[1], chosen % p.shape[1], values)
