"""The top-k sparse autoencoder (Gao et al., arXiv 2406.04093).

encode: p = (x - b_dec) W_enc + b_enc, keep the k largest per token, ReLU. decode: x^ = f W_dec + b_dec.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Sparse(NamedTuple):
    """The k active latents of each token."""

    values: Tensor
    """[..., k], >= 0; zero where fewer than k pre-activations are positive."""
    indices: Tensor
    """[..., k] int64, which latents."""


class TopKSae(nn.Module):
    """A top-k SAE over residuals of width `d_in`, with `d_sae` latents of which `k` are active per token.

    The latent unit: training scales residuals to a mean squared norm of `d_in` and folds that scale into the
    weights, so the SAE reads raw residuals, and one unit of a latent moves the residual by 1/sqrt(d_in) of its
    typical norm (`unit`). Decoder rows all have the norm `unit`. Values are therefore comparable between models.
    """

    def __init__(self, d_in: int, d_sae: int, k: int) -> None:
        super().__init__()
        if not 0 < k <= d_sae:
            raise ValueError(f"k is {k}, expected 1 to d_sae = {d_sae}")
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @property
    def unit(self) -> float:
        """Length of the residual's move per latent unit: the mean norm of the decoder rows."""
        return float(self.W_dec.detach().float().norm(dim=1).mean())

    def preactivations(self, x: Tensor) -> Tensor:
        """Pre-activations [..., d_sae] of residuals `x` [..., d_in], in the SAE's own precision."""
        x = x.to(self.W_enc.dtype)
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def encode_sparse(self, x: Tensor) -> Sparse:
        """The k active latents of each residual in `x` [..., d_in]."""
        top = self.preactivations(x).topk(self.k, dim=-1, sorted=False)
        return Sparse(top.values.relu(), top.indices)

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations [..., d_sae], dense, of residuals `x` [..., d_in]."""
        values, indices = self.encode_sparse(x)
        dense = values.new_zeros(*values.shape[:-1], self.d_sae)
        return dense.scatter(-1, indices, values)

    def activation(self, x: Tensor, latent: int) -> Tensor:
        """Activation [...] of one latent, exactly as `encode` gives it, without decoding or a top-k.

        A latent whose pre-activation is not positive is inactive, which costs one dot product to know. The others
        are active exactly if fewer than k pre-activations are larger. (Ties at the k-th place, which `topk` breaks
        arbitrarily, count as active here.)
        """
        x = x.to(self.W_enc.dtype)
        own = (x - self.b_dec) @ self.W_enc[:, latent] + self.b_enc[latent]
        maybe = own > 0
        result = torch.zeros_like(own)
        if bool(maybe.any()):
            p = self.preactivations(x[maybe])
            mine = p[:, latent]
            result[maybe] = mine.relu() * ((p > mine.unsqueeze(-1)).sum(-1) < self.k)
        return result

    def decode(self, latents: Tensor) -> Tensor:
        """Residuals [..., d_in] from dense latents [..., d_sae]."""
        return latents @ self.W_dec + self.b_dec

    def decode_sparse(self, sparse: Sparse) -> Tensor:
        """Residuals [..., d_in] from the active latents; gathers k decoder rows a token, no dense product."""
        flat = F.embedding_bag(
            sparse.indices.reshape(-1, self.k),
            self.W_dec,
            per_sample_weights=sparse.values.reshape(-1, self.k),
            mode="sum",
        )
        return flat.view(*sparse.indices.shape[:-1], self.d_in) + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of `x`."""
        return self.decode_sparse(self.encode_sparse(x))
