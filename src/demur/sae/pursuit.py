"""The matching-pursuit SAE (Costa et al., arXiv 2506.03093): latents are chosen one after the other.

encode: r = x - b_dec; k times at most, until the set of chosen latents stands still or |r| < threshold: take the latent
i with the largest (r W_enc)_i, add relu of it to f_i, subtract it times decoder row i from r. W_enc is W_dec
transposed, up to a folded input scale; b_enc is not used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from demur.sae.base import Normalize, Reader, Sae


class MatchingPursuitSae(Sae):
    """Chooses `k` times at most; stops at a residual norm of `residual_threshold`, in units of prepared residuals."""

    kind = "matching_pursuit"

    def __init__(
        self, d_in: int, d_sae: int, k: int, normalize: Normalize = "none", subtract_b_dec: bool = True
    ) -> None:
        if k < 1:
            raise ValueError(f"k is {k}, expected at least one latent a token")
        super().__init__(d_in, d_sae, normalize, subtract_b_dec)
        self.k = k
        self.residual_threshold = nn.Parameter(torch.zeros(()))

    def encode_prepared(self, x: Tensor) -> Tensor:
        """Latent activations [..., d_sae]; one product with the whole encoder for every latent chosen."""
        left = (x - self.b_dec if self.subtract_b_dec else x).reshape(-1, self.d_in)
        found = left.new_zeros(len(left), self.d_sae)
        rows = torch.arange(len(left), device=left.device)
        for _ in range(self.k):
            best = (left @ self.W_enc).max(-1)
            value = best.values.relu()
            stood = (value == 0) | (found[rows, best.indices] != 0)
            found[rows, best.indices] += value
            left = left - value.unsqueeze(-1) * self.W_dec[best.indices]
            goes_on = ~stood & (left.norm(dim=-1) >= self.residual_threshold)
            rows, left = rows[goes_on], left[goes_on]
        return found.view(*x.shape[:-1], self.d_sae)

    def reader(self, latents: Sequence[int], exact: bool = True) -> Reader:
        """Encodes everything: which latents are chosen depends on all of them."""
        chosen = torch.as_tensor(latents, device=self.W_enc.device)

        def read(x: Tensor, wanted: Tensor) -> Tensor:
            return self.encode_prepared(x)[:, chosen]

        return read
