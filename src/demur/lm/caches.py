"""The name under which models take their key-value cache: `cache` since transformers 5.24, `past_key_values` before."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from demur.errors import InputError

_NAMES = ("cache", "past_key_values")


def cache_argument(model: PreTrainedModel) -> str:
    """What `model` and its `generate` call the cache."""
    new, old = _NAMES
    return new if new in inspect.signature(model.get_decoder().forward).parameters else old


def plain_layers(cache: DynamicCache) -> list[Any]:
    """The layers of a cache with `keys` and `values` [batch, heads, pos, width] each.

    Raises `InputError` for a model that keeps something else (state-space layers).
    """
    if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise InputError(
            "the model keeps more than keys and values between tokens, which cannot be put side by side here"
        )
    return cache.layers


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a call, under either name; None without one."""
    return next((arguments[name] for name in _NAMES if arguments.get(name) is not None), None)
