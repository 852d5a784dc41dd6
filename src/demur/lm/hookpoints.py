"""Hookpoints: read every notation in use, find the block of any supported architecture.

Traps: Hugging Face's `hidden_states[L + 1]` is the output of 0-based block L, but its last entry is after the
final norm, so demur hooks the block module itself and never reads `hidden_states`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from demur.errors import InputError
from demur.types import Hookpoint

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_NOTATIONS = (
    r"layers\.(\d+)(?:\.resid_post)?",  # demur, sparsify
    r"blocks\.(\d+)\.hook_resid_post",  # TransformerLens, SAELens
    r"(?:model\.|transformer\.|gpt_neox\.|language_model\.)*(?:layers|h)\.(\d+)(?:\.output)?",  # module paths
    r"(\d+)",  # a bare block number
)
_RESID_PRE = re.compile(r"(?:blocks\.(\d+)\.hook_resid_pre|layers\.(\d+)\.resid_pre)")


def parse_hookpoint(text: str) -> Hookpoint:
    """Read `layers.12.resid_post`, `blocks.12.hook_resid_post`, `model.layers.12`, `h.12` or `12`.

    `resid_pre` of block L is `resid_post` of block L - 1. Raises `InputError` for anything else.
    """
    for notation in _NOTATIONS:
        if match := re.fullmatch(notation, text.strip()):
            return Hookpoint(int(match[1]))
    if match := _RESID_PRE.fullmatch(text.strip()):
        block = int(match[1] or match[2])
        if block > 0:
            return Hookpoint(block - 1)
    raise InputError(
        f"hookpoint {text!r} is not understood; write the output of a block as layers.12.resid_post "
        "(blocks.12.hook_resid_post, model.layers.12 and 12 mean the same)"
    )


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
