"""Read the residual at a hookpoint, and run the model only as far as, or only from, that block.

`resume` is what makes comparing many interventions cheap: everything up to the hookpoint is the same for all of
them, so it is computed once by `read` and reused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from demur.lm.hookpoints import block_at, blocks
from demur.types import Hookpoint


class _Stop(Exception):
    """Ends a forward pass at the hookpoint; never leaves this module."""


class Reading(NamedTuple):
    """A residual and what is needed to go on from it."""

    residual: Tensor
    """[batch, pos, d_model], the output of the block."""
    tuple_output: bool
    """Whether the blocks of this architecture return a tuple."""


def read(
    model: PreTrainedModel,
    hookpoint: Hookpoint,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Reading:
    """Residual at `hookpoint` for `input_ids` [batch, pos], running no block above it."""
    return _read(model, [hookpoint], input_ids, attention_mask, position_ids)[0]


def read_at(
    model: PreTrainedModel, hookpoints: Sequence[Hookpoint], input_ids: Tensor, attention_mask: Tensor | None = None
) -> list[Tensor]:
    """Residuals [batch, pos, d_model] at each of `hookpoints` for `input_ids` [batch, pos], in one pass that runs no
    block above the last of them. Memory: all of them at once, so give few rows."""
    return [reading.residual for reading in _read(model, hookpoints, input_ids, attention_mask)]


def _read(
    model: PreTrainedModel,
    hookpoints: Sequence[Hookpoint],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
) -> list[Reading]:
    found: dict[Hookpoint, Reading] = {}
    last = max(hookpoints, key=lambda hookpoint: hookpoint.block)

    def keep(hookpoint: Hookpoint, _module: Any, _args: Any, output: Any) -> None:
        is_tuple = isinstance(output, tuple)
        found[hookpoint] = Reading(output[0] if is_tuple else output, is_tuple)
        if hookpoint == last:
            raise _Stop

    modules = {hookpoint: block_at(model, hookpoint) for hookpoint in hookpoints}
    handles = [module.register_forward_hook(partial(keep, place)) for place, module in modules.items()]
    try:
        with torch.no_grad():
            model.get_decoder()(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            )
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [found[hookpoint] for hookpoint in hookpoints]


def read_all(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
    """`read_at` every block."""
    return read_at(model, [Hookpoint(block) for block in range(len(blocks(model)))], input_ids, attention_mask)


@contextmanager
def resume(model: PreTrainedModel, hookpoint: Hookpoint, reading: Reading) -> Iterator[None]:
    """Inside the block, forward passes start from `reading`: blocks up to the hookpoint are skipped.

    Hooks on the hookpoint's block still run, so an edit attached there edits the reading. Call the model with the
    same `input_ids` and mask as `read` had, and `use_cache=False`.
    """
    skipped = [*blocks(model)[: hookpoint.block], block_at(model, hookpoint)]

    def passes_on(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (hidden_states,) if reading.tuple_output else hidden_states

    def gives_reading(*_args: Any, **_kwargs: Any) -> Any:
        return (reading.residual,) if reading.tuple_output else reading.residual

    # whatever had replaced `forward` on the instance (accelerate does) comes back afterwards
    before = [block.__dict__.get("forward") for block in skipped]
    try:
        for block in skipped[:-1]:
            block.forward = passes_on
        skipped[-1].forward = gives_reading
        yield
    finally:
        for block, forward in zip(skipped, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward
