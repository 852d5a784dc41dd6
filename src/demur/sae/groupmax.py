"""The group-max SAE of EleutherAI's sparsify: latents in k equal groups, the largest of each group is active.

encode: p = (x - b_dec) W_enc + b_enc; in each group of d_sae / k neighbours the largest p stays, ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from demur.sae.base import Normalize, Reader, Sae


class GroupMaxSae(Sae):
    """Exactly one latent of each of `k` groups, at most, is active. `k` must divide `d_sae`."""

    kind = "groupmax"

    def __init__(
        self, d_in: int, d_sae: int, k: int, normalize: Normalize = "none", subtract_b_dec: bool = True
    ) -> None:
        if not 0 < k <= d_sae or d_sae % k:
            raise ValueError(f"k is {k}, expected a number of groups that divides d_sae = {d_sae}")
        super().__init__(d_in, d_sae, normalize, subtract_b_dec)
        self.k = k

    def encode_prepared(self, x: Tensor) -> Tensor:
        """Latent activations [..., d_sae]."""
        p = self.preactivations(x).unflatten(-1, (self.k, -1))
        best = p.max(-1, keepdim=True)
        return torch.zeros_like(p).scatter(-1, best.indices, best.values.relu()).flatten(-2)

    def reader(self, latents: Sequence[int], exact: bool = True) -> Reader:
        """Computes the groups of `latents` only; exact always (of equal largest, all count as active)."""
        size = self.d_sae // self.k
        groups = sorted({latent // size for latent in latents})
        columns, bias = self.thin([group * size + i for group in groups for i in range(size)])
        device = self.W_enc.device
        of_group = torch.tensor([groups.index(latent // size) for latent in latents], device=device)
        place = of_group * size + torch.tensor([latent % size for latent in latents], device=device)

        def read(x: Tensor, wanted: Tensor) -> Tensor:
            p = torch.addmm(bias, x, columns)
            own = p[:, place]
            largest: Tensor = p.unflatten(-1, (-1, size)).amax(-1)[:, of_group]
            return own.relu() * (own >= largest)

        return read
