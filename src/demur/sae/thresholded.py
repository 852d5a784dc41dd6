"""SAEs whose latents depend on their own pre-activation alone: JumpReLU, ReLU, batch-top-k, gated.

JumpReLU: f = p if p > threshold else 0 (Rajamanoharan et al., arXiv 2407.14435). ReLU: threshold 0. Batch-top-k
(Bussmann et al., arXiv 2412.06410): at inference a JumpReLU with one stored threshold. Gated (Rajamanoharan et al.,
arXiv 2404.16014): one affine map opens the gate, another gives the size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from demur.sae.base import Normalize, Reader, Sae


class JumpReluSae(Sae):
    """f = p where p > threshold (strictly), else 0."""

    kind = "jumprelu"

    def __init__(self, d_in: int, d_sae: int, normalize: Normalize = "none", subtract_b_dec: bool = True) -> None:
        super().__init__(d_in, d_sae, normalize, subtract_b_dec)
        self.threshold = nn.Parameter(torch.zeros(d_sae))

    def encode_prepared(self, x: Tensor) -> Tensor:
        """Latent activations [..., d_sae]."""
        p = self.preactivations(x)
        return p.relu() * (p > self.threshold)

    def reader(self, latents: Sequence[int], exact: bool = True) -> Reader:
        """One dot product a token and latent; exact always."""
        columns, bias = self.thin(latents)
        threshold = self.threshold[torch.as_tensor(latents, device=self.threshold.device)].clamp(min=0)
        single = float(threshold[0]) if bool((threshold == threshold[0]).all()) else None

        def read(x: Tensor, wanted: Tensor) -> Tensor:
            own = torch.addmm(bias, x, columns)
            # one operation in place of two, and it gives no -0.0
            return torch.where(own > threshold, own, 0) if single is None else torch.threshold(own, single, 0)

        return read


class ReluSae(JumpReluSae):
    """f = max(p, 0)."""

    kind = "relu"


class BatchTopKSae(JumpReluSae):
    """Batch-top-k at inference: one threshold for all latents."""

    kind = "batchtopk"


class GatedSae(Sae):
    """f = relu(q exp(r_mag) + b_mag) where q + b_enc > 0, else 0, with q = (x - b_dec) W_enc; b_enc is the gate's."""

    kind = "gated"

    def __init__(self, d_in: int, d_sae: int, normalize: Normalize = "none", subtract_b_dec: bool = True) -> None:
        super().__init__(d_in, d_sae, normalize, subtract_b_dec)
        self.b_mag = nn.Parameter(torch.zeros(d_sae))
        self.r_mag = nn.Parameter(torch.zeros(d_sae))

    def encode_prepared(self, x: Tensor) -> Tensor:
        """Latent activations [..., d_sae]."""
        gate = self.preactivations(x)
        return ((gate - self.b_enc) * self.r_mag.exp() + self.b_mag).relu() * (gate > 0)

    def reader(self, latents: Sequence[int], exact: bool = True) -> Reader:
        """One dot product a token and latent; exact always."""
        columns, bias = self.thin(latents)
        chosen = torch.as_tensor(latents, device=self.b_mag.device)
        b_enc, b_mag, size = self.b_enc[chosen], self.b_mag[chosen], self.r_mag[chosen].exp()

        def read(x: Tensor, wanted: Tensor) -> Tensor:
            gate = torch.addmm(bias, x, columns)
            return ((gate - b_enc) * size + b_mag).relu() * (gate > 0)

        return read


KINDS: dict[str, type[Sae]] = {sae.kind: sae for sae in (JumpReluSae, ReluSae, BatchTopKSae, GatedSae)}
"""Every kind here, by its name in files."""
