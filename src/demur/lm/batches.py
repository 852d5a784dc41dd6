"""Batches: which rows go together, how they are padded, and the key-value cache of what they all begin with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from demur.lm.caches import cache_argument
from demur.lm.load import LanguageModel

Row = Sequence[int]
_WORTHWHILE = 8
"""Tokens below which running a common beginning by itself does not pay."""


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of at most `size` rows of similar length, longest first (memory fails early, not late).

    The same lengths give the same batches, so that a resumed run repeats a batch exactly.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]


class Padded(NamedTuple):
    """Rows of unlike length as one tensor."""

    ids: Tensor
    """[batch, pos] int64."""
    mask: Tensor
    """[batch, pos] int64, 1 on tokens, 0 on padding."""


def pad(lm: LanguageModel, rows: Sequence[Row], side: str) -> Padded:
    """Pad `rows` on the `left` (to generate) or `right` (to score) with the tokenizer's padding token."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), lm.pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return Padded(ids.to(lm.device), mask.to(lm.device))


def shared_length(rows: Sequence[Row]) -> int:
    """How many tokens all rows begin with, at least one token of each row not counted."""
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))
    return min(sum(1 for _ in same), min(len(row) for row in rows) - 1)


class Prefixed(NamedTuple):
    """Rows without what they all begin with, and the cache of that beginning."""

    rows: list[Row]
    prefix: Row
    cache: DynamicCache
    """`times` rows wide, or empty when the rows share too little to be worth it."""


def share_prefix(lm: LanguageModel, rows: Sequence[Row], times: int = 1) -> Prefixed:
    """Run what all rows begin with (a system prompt, mostly) `times` instead of once a row.

    Under the steering in force, so the cache is exact for it. At least one token is left in every row.
    """
    cache = DynamicCache(config=lm.model.config)
    length = shared_length(rows)
    if length < _WORTHWHILE or times >= len(rows):
        return Prefixed([list(row) for row in rows], [], cache)
    prefix = list(rows[0][:length])
    with torch.no_grad():
        lm.model.get_decoder()(
            input_ids=torch.tensor([prefix] * times, device=lm.device),
            use_cache=True,
            **{cache_argument(lm.model): cache},
        )
    return Prefixed([list(row[length:]) for row in rows], prefix, cache)
