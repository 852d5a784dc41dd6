"""What every sparse autoencoder has in common, and how chosen latents are read without encoding the others.

Steering asks an SAE for few latents of many tokens. `Sae.reader` answers that exactly, and for kinds whose latents
depend on their own pre-activation alone at the cost of one dot product per token and latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from demur.errors import InputError

Normalize = Literal["none", "layer_norm", "constant_norm"]
"""What is done to each token before encoding and undone after decoding. `layer_norm`: mean removed, divided by the
unbiased standard deviation + 1e-5. `constant_norm`: scaled to the norm sqrt(d_in). (SAELens: `layer_norm`,
`constant_norm_rescale`; a fixed scale is folded into the weights instead.)"""


class Prepared(NamedTuple):
    """Residuals as the SAE reads them: (x - shift) / scale."""

    x: Tensor
    """[..., d_in] in the SAE's precision."""
    scale: Tensor | None
    """[..., 1]; None for 1."""
    shift: Tensor | None
    """[..., 1]; None for 0."""

    def restore(self, decoded: Tensor) -> Tensor:
        """Decoded residuals [..., d_in] in the units of the raw ones."""
        decoded = decoded if self.scale is None else decoded * self.scale
        return decoded if self.shift is None else decoded + self.shift


class Reference(NamedTuple):
    """What each latent does on the reference text of the SAE."""

    max_act: Tensor
    """[d_sae] largest activation."""
    sigma: Tensor
    """[d_sae] standard deviation over all tokens, inactive ones included."""
    rate: Tensor
    """[d_sae] share of tokens on which it is active."""
    threshold: Tensor
    """[] for a top-k SAE: mean over tokens of the smallest active pre-activation, else 0. See `Sae.reader`."""


Reader = Callable[[Tensor, Tensor], Tensor]
"""Prepared residuals [n, d_in] and which latents are wanted where [n, latents] (bool) to their activations
[n, latents]; where they are not wanted, anything."""


class Sae(nn.Module, ABC):
    """f = activation((x - b_dec) W_enc + b_enc); x^ = f W_dec + b_dec. Activations are never negative."""

    kind: ClassVar[str]
    """Name of the architecture in files."""

    def __init__(self, d_in: int, d_sae: int, normalize: Normalize = "none", subtract_b_dec: bool = True) -> None:
        super().__init__()
        self.d_in, self.d_sae = d_in, d_sae
        self.normalize: Normalize = normalize
        self.subtract_b_dec = subtract_b_dec
        """Whether b_dec is taken from the input before encoding; Gemma Scope and Llama Scope do not."""
        self.reference: Reference | None = None
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @property
    def unit(self) -> float:
        """Length of the residual's move per latent unit: the mean norm of the decoder rows."""
        return float(self.W_dec.detach().float().norm(dim=1).mean())

    def prepare(self, x: Tensor) -> Prepared:
        """Raw residuals `x` [..., d_in] as the SAE reads them."""
        x = x.to(self.W_enc.dtype)
        if self.normalize == "layer_norm":
            shift = x.mean(-1, keepdim=True)
            x = x - shift
            scale = x.std(-1, keepdim=True) + 1e-5
            return Prepared(x / scale, scale, shift)
        if self.normalize == "constant_norm":
            scale = x.norm(dim=-1, keepdim=True) / self.d_in**0.5
            return Prepared(x / scale, scale, None)
        return Prepared(x, None, None)

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations [..., d_sae], dense, of raw residuals `x` [..., d_in]."""
        return self.encode_prepared(self.prepare(x).x)

    @abstractmethod
    def encode_prepared(self, x: Tensor) -> Tensor:
        """Latent activations [..., d_sae] of prepared residuals [..., d_in]."""

    @abstractmethod
    def reader(self, latents: Sequence[int], exact: bool = True) -> Reader:
        """A function that reads `latents` only, exactly as `encode` gives them.

        `exact=False` lets a top-k SAE decide by its stored threshold in place of the rank, which costs one dot product
        and is wrong for a share of tokens; the other kinds are that cheap and exact anyway.
        """

    def preactivations(self, x: Tensor) -> Tensor:
        """Pre-activations [..., d_sae] of prepared residuals."""
        return (x - self.b_dec if self.subtract_b_dec else x) @ self.W_enc + self.b_enc

    def decode(self, latents: Tensor) -> Tensor:
        """Prepared residuals [..., d_in] from dense latents [..., d_sae]."""
        return latents @ self.W_dec + self.b_dec

    def reconstruct(self, x: Tensor) -> Tensor:
        """Raw residuals [..., d_in] as the SAE reconstructs them."""
        prepared = self.prepare(x)
        return prepared.restore(self.decode(self.encode_prepared(prepared.x)))

    def forward(self, x: Tensor) -> Tensor:
        """`reconstruct`."""
        return self.reconstruct(x)

    def thin(self, latents: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Encoder columns [d_in, n] and biases [n] of `latents`, b_dec folded into the bias."""
        chosen = torch.as_tensor(latents, device=self.W_enc.device)
        columns = self.W_enc[:, chosen].contiguous()
        bias = self.b_enc[chosen]
        return columns, bias - self.b_dec @ columns if self.subtract_b_dec else bias

    def in_units(self, latents: Sequence[int], value: float, unit: str) -> Tensor:
        """`value` in latent units, one for each of `latents` [n]. Raises `InputError` without reference statistics."""
        chosen = torch.as_tensor(latents, device=self.W_enc.device)
        if unit == "latent":
            return torch.full((len(latents),), value, device=chosen.device)
        if self.reference is None:
            raise InputError(
                f"the unit {unit} needs the SAE's reference statistics, which this SAE has not; "
                "measure them with `demur sae measure`, or give values in the unit latent"
            )
        scale = (self.reference.max_act if unit == "max_act" else self.reference.sigma).to(chosen.device)[chosen]
        if not bool((scale > 0).all()):
            never = [latent for latent, s in zip(latents, scale.tolist(), strict=True) if s <= 0]
            raise InputError(
                f"latent {never[0]} never fired on the SAE's reference text, so the unit {unit} means nothing for it; "
                "give its value in the unit latent"
            )
        return value * scale
