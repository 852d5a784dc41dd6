"""The top-k sparse autoencoder (Gao et al., arXiv 2406.04093).

encode: p = (x - b_dec) W_enc + b_enc, keep the k largest per token, ReLU. decode: x^ = f W_dec + b_dec.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from demur.errors import InputError
from demur.sae.base import Normalize, Reader, Sae

_CHUNK = 1 << 24
"""Pre-activations held at once while ranking: 64 MB in float32."""
_COUNTED = 4
"""Latents up to which counting larger pre-activations for each beats finding the k-th largest once."""


class Sparse(NamedTuple):
    """The k active latents of each token."""

    values: Tensor
    """[..., k], >= 0; zero where fewer than k pre-activations are positive."""
    indices: Tensor
    """[..., k] int64, which latents."""


class TopKSae(Sae):
    """A top-k SAE over residuals of width `d_in`, with `d_sae` latents of which `k` are active per token.

    The latent unit: training scales residuals to a mean squared norm of `d_in` and folds that scale into the
    weights, so the SAE reads raw residuals, and one unit of a latent moves the residual by 1/sqrt(d_in) of its
    typical norm (`unit`). Decoder rows all have the norm `unit`. Values are therefore comparable between models.
    """

    kind = "topk"

    def __init__(
        self, d_in: int, d_sae: int, k: int, normalize: Normalize = "none", subtract_b_dec: bool = True
    ) -> None:
        if not 0 < k <= d_sae:
            raise ValueError(f"k is {k}, expected 1 to d_sae = {d_sae}")
        super().__init__(d_in, d_sae, normalize, subtract_b_dec)
        self.k = k

    def encode_sparse(self, x: Tensor) -> Sparse:
        """The k active latents of each prepared residual in `x` [..., d_in]."""
        top = self.preactivations(x).topk(self.k, dim=-1, sorted=False)
        return Sparse(top.values.relu(), top.indices)

    def encode_prepared(self, x: Tensor) -> Tensor:
        """Latent activations [..., d_sae], dense."""
        values, indices = self.encode_sparse(x)
        dense = values.new_zeros(*values.shape[:-1], self.d_sae)
        return dense.scatter(-1, indices, values)

    def decode_sparse(self, sparse: Sparse) -> Tensor:
        """Prepared residuals [..., d_in] from the active latents; gathers k decoder rows a token, no dense product."""
        flat = F.embedding_bag(
            sparse.indices.reshape(-1, self.k),
            self.W_dec,
            per_sample_weights=sparse.values.reshape(-1, self.k),
            mode="sum",
        )
        return flat.view(*sparse.indices.shape[:-1], self.d_in) + self.b_dec

    def reconstruct(self, x: Tensor) -> Tensor:
        """Raw residuals [..., d_in] as the SAE reconstructs them."""
        prepared = self.prepare(x)
        return prepared.restore(self.decode_sparse(self.encode_sparse(prepared.x)))

    def reader(self, latents: Sequence[int], exact: bool = True) -> Reader:
        """Reads `latents` without a top-k and without decoding.

        A latent whose pre-activation is not positive is inactive, which one dot product tells. Only tokens where some
        wanted latent is positive are encoded, and there a latent is active exactly if fewer than k pre-activations
        are larger. (Ties at the k-th place, which `topk` breaks arbitrarily, count as active here.)
        """
        columns, bias = self.thin(latents)
        if not exact:
            threshold = self._threshold()

            def read_fast(x: Tensor, wanted: Tensor) -> Tensor:
                own = torch.addmm(bias, x, columns)
                return own * (wanted & (own >= threshold) & (own > 0))

            return read_fast
        chosen = torch.as_tensor(latents, device=self.W_enc.device)
        folded = self.b_enc - self.b_dec @ self.W_enc if self.subtract_b_dec else self.b_enc
        folded = folded.unsqueeze(-1)
        by_latent = self._lay_out_by_latent()
        single = int(latents[0]) if len(latents) == 1 else None
        chunk = max(1, _CHUNK // self.d_sae)

        def read(x: Tensor, wanted: Tensor) -> Tensor:
            own = torch.addmm(bias, x, columns)
            maybe = wanted & (own > 0)
            if len(x) > 1:
                rows = maybe.any(-1).nonzero().flatten()
                if len(rows) < len(x):
                    found = torch.zeros_like(own)
                    for some in rows.split(chunk):
                        found[some] = ranked(x[some], maybe[some])
                    return found
            elif not bool(maybe.any()):
                return torch.zeros_like(own)
            if len(x) <= chunk:
                return ranked(x, maybe)
            return torch.cat([ranked(*part) for part in zip(x.split(chunk), maybe.split(chunk), strict=True)])

        def ranked(x: Tensor, maybe: Tensor) -> Tensor:
            p = torch.addmm(folded, by_latent, x.T)
            own = p[single : single + 1] if single is not None else p[chosen]
            return own.relu().T * (maybe & self._among_largest(p, own).T)

        return read

    def _lay_out_by_latent(self) -> Tensor:
        """The encoder as [d_sae, d_in], one latent after the other in memory; `W_enc` becomes a view of it.

        For a few tokens a product in this order takes half to a third of the time that x W_enc takes (measured:
        docs/benchmarks.md). No number changes and no memory is taken twice.
        """
        by_latent = self.W_enc.data.T
        if not by_latent.is_contiguous():
            by_latent = by_latent.contiguous()
            self.W_enc.data = by_latent.T
        return by_latent

    def _among_largest(self, p: Tensor, own: Tensor) -> Tensor:
        """Whether each of `own` [latents, n] is one of the k largest of its column of `p` [d_sae, n]."""
        if len(own) > _COUNTED:
            return own >= p.T.topk(self.k, dim=-1, sorted=False).values.amin(-1)
        # counts what is strictly larger, in operations that run at the speed of memory
        counts = [(p - one).clamp_(min=0).sign_().sum(0, keepdim=True) for one in own.split(1)]
        return (counts[0] if len(counts) == 1 else torch.cat(counts)) < self.k

    def _threshold(self) -> Tensor:
        if self.reference is None:
            raise InputError(
                "the fast threshold path (exact = false) needs the SAE's reference statistics, which this SAE has not; "
                "measure them with `demur sae measure`, or leave exact on"
            )
        return self.reference.threshold.to(self.W_enc.device)
