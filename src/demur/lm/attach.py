"""Attach pure functions to a hookpoint: they read or replace the residual while a `with` block runs.

Leaving the block removes every hook, also after an error, and the model is bit for bit what it was.
Positions are absolute: under a KV cache a forward pass sees one token, and `Step` says which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from demur.errors import InputError
from demur.lm.hookpoints import block_at
from demur.types import Hookpoint


class Step(NamedTuple):
    """Where in the text one forward pass is."""

    positions: Tensor
    """[batch, pos] int64: index of each token in its own row, padding not counted; -1 for padding."""


Edit = Callable[[Tensor, Step], Tensor]
"""Residual [batch, pos, d_model] and step to a NEW residual of the same shape; never in place."""


@contextmanager
def attach(model: PreTrainedModel, hookpoint: Hookpoint, edit: Edit) -> Iterator[None]:
    """Replace the residual at `hookpoint` by `edit(residual, step)` inside the block.

    Edits attached later see what earlier ones returned. Raises `InputError` for a hookpoint outside the model.
    """
    block = block_at(model, hookpoint)
    current: list[Step] = []

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current[:] = [_step(args, kwargs)]

    def after(_module: Any, _args: Any, output: Any) -> Any:
        residual = output[0] if isinstance(output, tuple) else output
        edited = edit(residual, current[0])
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    with ExitStack() as stack:
        stack.callback(model.get_decoder().register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(block.register_forward_hook(after).remove)
        yield


def _step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
    """Absolute positions of the tokens in a call of the decoder, from its mask and its cache."""
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = args[0] if args else kwargs["inputs_embeds"]
    batch, length = tokens.shape[:2]
    cache = kwargs.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == past + length:
        positions = mask.long().cumsum(-1) - 1
        positions = positions.masked_fill(mask == 0, -1)[:, past:]
    elif mask is not None:
        raise InputError(
            "the model was called with an attention mask that is not one 0 or 1 per token, so padding cannot be told "
            "from text; pass a 2-D attention_mask, or use the text-only class of the model"
        )
    else:
        positions = torch.arange(past, past + length, device=tokens.device).expand(batch, length)
    return Step(positions)
