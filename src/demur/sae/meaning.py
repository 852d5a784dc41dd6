"""What an SAE's weights mean (`SaeConfig`), and the module that weights and meaning make together (`build`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from demur.errors import InputError, MismatchError
from demur.sae.base import Normalize, Sae
from demur.sae.groupmax import GroupMaxSae
from demur.sae.pursuit import MatchingPursuitSae
from demur.sae.thresholded import KINDS
from demur.sae.topk import TopKSae

FORMAT = "demur-sae/1"
_WITH_K = {sae.kind: sae for sae in (TopKSae, GroupMaxSae, MatchingPursuitSae)}


@dataclass(frozen=True)
class SaeModel:
    """The language model an SAE was trained on."""

    name: str
    """Empty where the file names none."""
    fingerprint: str
    """`LanguageModel.fingerprint`; empty for an SAE from elsewhere."""
    n_blocks: int
    """0 for an SAE from elsewhere."""


@dataclass(frozen=True)
class SaeConfig:
    """`cfg.json`: what the weights mean."""

    d_in: int
    d_sae: int
    k: int
    """Active latents per token: exactly, at most or on average, as the architecture has it; 0 where none is stated."""
    hookpoint: str
    """A residual stream as `layers.12.resid_post`; any other place as the file has it, empty where it has none."""
    model: SaeModel
    architecture: str = "topk"
    """`topk`, `groupmax`, `batchtopk`, `jumprelu`, `relu`, `gated` or `matching_pursuit`."""
    normalize: Normalize = "none"
    subtract_b_dec: bool = True
    format: str = FORMAT
    training: dict[str, Any] = field(default_factory=dict)
    """Data, tokens, seed, command and commit."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Held-out FVU, L0, dead share and the like, of the weights as stored."""
    source: str = ""
    """Of an SAE from elsewhere: its format, and where it was read, e.g. `saelens: owner/repo/blocks.5`."""
    notes: tuple[str, ...] = ()
    """What a user of an SAE from elsewhere must know, a sentence each."""


@dataclass(frozen=True)
class LoadedSae:
    """An SAE ready to use."""

    sae: Sae
    config: SaeConfig
    hash: str
    """16 hex digits over weights and meaning."""
    path: str


def build(config: SaeConfig, tensors: Mapping[str, Tensor], weights: str, asks: str) -> Sae:
    """The SAE that `config` and `tensors` (named as in `Sae`) make, in float32, on the CPU, frozen.

    `weights` and `asks` name where each was read, for the errors. Raises as `check`, and `InputError` for an impossible
    k or an unknown architecture.
    """
    sae = _empty(config, asks)
    shapes = {name: tuple(value.shape) for name, value in sae.state_dict().items()}
    sae.load_state_dict(check(tensors, shapes, weights, asks))
    return sae.requires_grad_(False)


def check(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], weights: str, asks: str
) -> dict[str, Tensor]:
    """The tensors that `shapes` names, in float32, on the CPU.

    Raises `MismatchError` for a missing tensor or another shape, `InputError` for integers, NaN or infinity (a
    threshold may be infinite: that latent never fires).
    """
    apart = "the two do not belong together"
    if missing := [name for name in shapes if name not in tensors]:
        raise MismatchError(f"{weights}: {missing[0]} is missing, which {asks} asks for; {apart}")
    found = {}
    for name, wanted in shapes.items():
        value = tensors[name]
        if tuple(value.shape) != wanted:
            raise MismatchError(f"{weights}: {name} is {tuple(value.shape)}, but {asks} asks for {wanted}; {apart}")
        if not value.is_floating_point():
            raise InputError(
                f"{weights}: {name} holds {str(value.dtype).removeprefix('torch.')}, expected floating-point numbers; "
                "a quantised SAE must be stored as float first"
            )
        value = value.to("cpu", torch.float32)
        if not bool((~value.isnan() if "threshold" in name else value.isfinite()).all()):
            raise InputError(f"{weights}: {name} holds NaN or infinity; the file is damaged or training diverged")
        found[name] = value
    return found


def _empty(config: SaeConfig, asks: str) -> Sae:
    rest = (config.normalize, config.subtract_b_dec)
    kind, d_in, d_sae, k = config.architecture, config.d_in, config.d_sae, config.k
    if kind in KINDS:
        return KINDS[kind](d_in, d_sae, *rest)
    if kind not in _WITH_K:
        raise InputError(f"{asks} names the architecture {kind!r}; this version knows {', '.join((*_WITH_K, *KINDS))}")
    try:
        return _WITH_K[kind](d_in, d_sae, k, *rest)
    except ValueError as error:
        raise InputError(f"{asks} cannot be right: {error}") from None
