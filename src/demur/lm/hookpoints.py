"""Hookpoints in a model: find the block of any supported architecture.

Traps: Hugging Face's `hidden_states[L + 1]` is the output of 0-based block L, but its last entry is after the
final norm, so demur hooks the block module itself and never reads `hidden_states`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from demur.errors import InputError
from demur.types import Hookpoint

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks in order. Raises `InputError` for an architecture without a plain list of them."""
    from torch import nn

    decoder = model.get_decoder()
    for name in ("layers", "h", "blocks"):
        found = getattr(decoder, name, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise InputError(
        f"no list of transformer blocks was found in {type(model).__name__}; demur knows Llama, Phi-3, Gemma, "
        "Qwen, Mistral, GPT-NeoX, GPT-2 and models built like them"
    )


def width(model: PreTrainedModel) -> int:
    """Width of the residual stream, d_model."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[1])


def block_at(model: PreTrainedModel, hookpoint: Hookpoint) -> nn.Module:
    """The module whose output is `hookpoint`. Raises `InputError` when the model has no such block."""
    found = blocks(model)
    if hookpoint.block >= len(found):
        raise InputError(
            f"hookpoint {hookpoint} is outside the model, which has {len(found)} blocks; "
            f"choose layers.0.resid_post to layers.{len(found) - 1}.resid_post"
        )
    return found[hookpoint.block]


def device_at(model: PreTrainedModel, hookpoint: Hookpoint) -> torch.device:
    """Where the residual at `hookpoint` is computed; also for a block whose weights are kept elsewhere meanwhile."""
    import torch

    block = block_at(model, hookpoint)
    stored = next(block.parameters()).device
    if stored.type != "meta":
        return stored
    keeper = getattr(block, "_hf_hook", None)  # accelerate brings the weights of the block when it runs
    found = getattr(keeper, "execution_device", None)
    return torch.device("cpu" if found is None else found)
