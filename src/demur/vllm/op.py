"""The custom op `demur::steer`, by which vLLM's compiled models and CUDA graphs call `Place.apply`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from demur.errors import MismatchError
from demur.vllm.place import Place

PLACES: dict[int, Place] = {}
"""Of the model in this process, by block. Tables and buffers keep their addresses, so a captured graph stays right."""


def _steer(hidden: Tensor, residual: Tensor | None, block: int) -> None:
    if residual is None and hidden.dim() == 3 and len(hidden) == 1:
        hidden = hidden[0]  # models that vLLM takes from transformers keep a batch of one
    if hidden.dim() != 2 or (residual is not None and residual.shape != hidden.shape):
        other = "" if residual is None else f" and {tuple(residual.shape)}"
        raise MismatchError(
            f"block {block} returned a residual of shape {tuple(hidden.shape)}{other}, expected [tokens, d_model]; "
            "serve this model with `demur serve`"
        )
    PLACES[block].apply(hidden, residual)


def _shapes(hidden: Tensor, residual: Tensor | None, block: int) -> None:
    return None


@cache
def define() -> torch.library.Library:
    """Make the op known to torch; what is returned must be kept, and is."""
    library = torch.library.Library("demur", "FRAGMENT")
    # `(a!)`: hidden is changed in place, so that nothing may be moved past the op or thrown away
    library.define("steer(Tensor(a!) hidden, Tensor? residual, int block) -> ()")
    library.impl("steer", _steer, "CompositeExplicitAutograd")
    torch.library.register_fake("demur::steer", _shapes, lib=library)
    return library
