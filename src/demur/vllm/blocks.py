"""Find the blocks of a model that vLLM has loaded, and make those that are steered call the op.

A block's class is exchanged for a subclass whose `forward` calls the inherited one and then the op. Names of modules
and weights stay as they are, torch.compile traces the subclass like any other, and blocks that are not steered are
untouched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from demur.errors import InputError, MismatchError

MODELS = ("llama", "mistral", "phi3", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "gpt2")
"""Model types whose blocks, in vLLM, return the residual stream as one tensor or as two to be added."""


def check_model_type(model_type: str) -> None:
    """Raise `InputError` for a model whose blocks demur has not been made for."""
    if model_type not in MODELS:
        raise InputError(
            f"the model is of type {model_type!r}, but demur's plugin knows how the blocks of {', '.join(MODELS)} hand "
            "on the residual in vLLM; serve it with `demur serve`, or unset DEMUR_SPECS"
        )


def find_blocks(model: nn.Module, n_blocks: int) -> nn.ModuleList:
    """The model's transformer blocks. Raises `MismatchError` unless there is exactly one list of `n_blocks` of them."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_blocks and re.search(r"(^|\.)(layers|h)$", name)
    ]
    if len(found) != 1:
        raise MismatchError(
            f"{type(model).__name__} has {len(found)} lists of {n_blocks} transformer blocks, expected one; demur "
            "cannot tell where to steer it"
        )
    return found[0][1]


def hook(blocks: nn.ModuleList, chosen: Iterable[int]) -> list[int]:
    """Make `chosen` blocks call the op, and return those that are in this process (a pipeline has the others)."""
    here = []
    for number in chosen:
        block: Any = blocks[number]
        if type(block).__name__ == "PPMissingLayer":
            continue
        if "forward" in vars(block):
            raise MismatchError(
                f"block {number} has a forward of its own (weights are offloaded?), which demur cannot extend; keep "
                "the weights on the device"
            )
        block.demur_block = number
        kind = type(block)
        block.__class__ = _STEERED[kind] = _STEERED.get(kind) or _steered(kind)
        here.append(number)
    return here


_STEERED: dict[Any, Any] = {}
"""Each class of blocks once, as torch.compile tells classes apart."""


def _steered(kind: Any) -> Any:
    inherited = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = inherited(self, *args, **kwargs)
        if isinstance(output, tuple):
            torch.ops.demur.steer(output[0], output[1], self.demur_block)
        else:
            torch.ops.demur.steer(output, None, self.demur_block)
        return output

    return type(f"Steered{kind.__name__}", (kind,), {"forward": forward, "__module__": kind.__module__})
