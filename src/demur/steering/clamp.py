"""The clamp: set one SAE latent to a value, and change nothing else.

Encoding, setting latent i to c, decoding and adding the SAE's error back is exactly x + (c - f_i) W_dec[i], because
every other term cancels. So nothing is decoded: the only question is f_i, and the SAE answers it exactly.
(O'Brien et al., arXiv 2411.11296, section 3, clamp the same latent; the error term is kept here.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from demur.sae.topk import TopKSae


def clamp(x: Tensor, sae: TopKSae, latent: int, value: float, steered: Tensor) -> Tensor:
    """Residuals like `x` [..., d_in] with `latent` set to `value` where `steered` [...] is true.

    Returns a new tensor in the precision of `x`; computes in the SAE's. Tokens that are not steered keep their bits.
    """
    delta = (value - sae.activation(x, latent)).unsqueeze(-1) * sae.W_dec[latent]
    return torch.where(steered.unsqueeze(-1), (x.to(delta.dtype) + delta).to(x.dtype), x)
