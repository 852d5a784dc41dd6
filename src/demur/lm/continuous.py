"""Continuous batching: answers join a running batch and leave it between any two tokens.

Greedy or sampled, each row by its own settings. Every row has a slot for as long as it runs, by which whatever is
attached to the model tells it from the others (`Step.rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from demur.errors import InputError
from demur.lm.attach import Generation, generation
from demur.lm.batches import Row, pad
from demur.lm.caches import cache_argument, plain_layers
from demur.lm.load import LanguageModel
from demur.lm.sampling import Drawn, Draws, Sampling, draw

_SPARE = 64
"""Columns of nothing but padding that are worth cutting off."""


class Wanted(NamedTuple):
    """An answer to be written."""

    ids: Row
    """Token ids of the prompt."""
    sampling: Sampling
    began: Callable[[int], None] = lambda slot: None
    """Told the slot, before the prompt is run."""


class Token(NamedTuple):
    """The next token of the row in a slot."""

    slot: int
    drawn: Drawn
    last: bool
    """The end-of-turn token, or as many as were allowed: the slot is free again."""
    stopped: bool
    """It is the end-of-turn token."""


class _Row:
    """An answer being written."""

    def __init__(self, slot: int, wanted: Wanted) -> None:
        self.slot, self.length, self.new = slot, len(wanted.ids), 0
        self.draws = Draws(wanted.sampling)


class Continuous:
    """A batch of at most `slots` answers; nothing runs but inside `join` and `step`."""

    def __init__(self, lm: LanguageModel, slots: int) -> None:
        self._lm = lm
        self._free = list(range(slots))[::-1]
        self._rows: list[_Row] = []
        self._next = torch.empty(0, 1, dtype=torch.long, device=lm.device)
        self._cache, self._mask = DynamicCache(), torch.empty(0, 0, dtype=torch.long, device=lm.device)
        self._about = Generation(slots, lengths=torch.zeros(slots, dtype=torch.long))

    @property
    def free(self) -> int:
        """Slots in which nothing runs."""
        return len(self._free)

    @property
    def running(self) -> int:
        """Answers being written."""
        return len(self._rows)

    def join(self, wanted: Sequence[Wanted]) -> list[Token]:
        """Run the prompts of as many answers as there are free slots at most; the first token of each.

        All of them or, after an error, none has joined.
        """
        if len(wanted) > len(self._free):
            raise InputError(f"{len(wanted)} answers are to begin, but {len(self._free)} slots are free; give fewer")
        if not wanted:
            return []
        rows = [_Row(slot, one) for slot, one in zip(self._free[: -len(wanted) - 1 : -1], wanted, strict=True)]
        for row, one in zip(rows, wanted, strict=True):
            one.began(row.slot)
        assert self._about.lengths is not None
        self._about.lengths[[row.slot for row in rows]] = torch.tensor([row.length for row in rows])
        padded = pad(self._lm, [one.ids for one in wanted], side="left")
        cache = DynamicCache()
        tokens = self._pass(rows, padded.ids, padded.mask, cache)
        del self._free[-len(wanted) :]
        if self._rows:
            width = max(padded.mask.shape[1], self._mask.shape[1])
            cache = _beside(_widened(self._cache, width), _widened(cache, width))
            mask = torch.cat([_padded(self._mask, width), _padded(padded.mask, width)])
        else:
            mask = padded.mask
        self._cache, self._mask = cache, mask
        self._rows += rows
        self._next = torch.cat([self._next, self._column(tokens)])
        return self._leave(tokens)

    def step(self) -> list[Token]:
        """The next token of every answer that runs."""
        if not self._rows:
            return []
        mask = torch.cat([self._mask, torch.ones_like(self._next)], dim=1)
        tokens = self._pass(self._rows, self._next, mask, self._cache)
        self._mask, self._next = mask, self._column(tokens)
        return self._leave(tokens)

    def drop(self, slots: Sequence[int]) -> None:
        """End the answers in `slots`; what does not run is passed over."""
        going = [place for place, row in enumerate(self._rows) if row.slot not in slots]
        if len(going) == len(self._rows):
            return
        self._free += [row.slot for row in self._rows if row.slot in slots]
        self._rows = [self._rows[place] for place in going]
        if not going:
            self._cache, self._mask = DynamicCache(), self._mask[:0, :0]
            self._next = self._next[:0]
            return
        kept = torch.tensor(going, device=self._mask.device)
        self._cache.batch_select_indices(kept)
        self._mask, self._next = self._mask[kept], self._next[kept]
        spare = int(self._mask.any(0).int().argmax())
        if spare >= _SPARE:
            self._mask = self._mask[:, spare:]
            for layer in plain_layers(self._cache):
                layer.keys, layer.values = layer.keys[:, :, spare:], layer.values[:, :, spare:]

    def _pass(self, rows: Sequence[_Row], ids: Tensor, mask: Tensor, cache: DynamicCache) -> list[Token]:
        """Run `ids` [batch, pos] of `rows`, which go into the cache, and draw what comes next."""
        lm = self._lm
        self._about.rows = torch.tensor([row.slot for row in rows], device=lm.device)
        with torch.no_grad(), generation(lm.model, self._about):
            logits = lm.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                use_cache=True,
                logits_to_keep=1,
                **{cache_argument(lm.model): cache},
            ).logits[:, -1]
        found = []
        for row, drawn in zip(rows, draw(logits.float(), [row.draws for row in rows]), strict=True):
            row.new += 1
            stopped = drawn.token in lm.eos_ids
            found.append(Token(row.slot, drawn, stopped or row.new >= row.draws.sampling.max_new_tokens, stopped))
        return found

    def _column(self, tokens: Sequence[Token]) -> Tensor:
        return torch.tensor([[token.drawn.token] for token in tokens], device=self._mask.device)

    def _leave(self, tokens: list[Token]) -> list[Token]:
        self.drop([token.slot for token in tokens if token.last])
        return tokens


def _padded(mask: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask, (width - mask.shape[1], 0))


def _widened(cache: DynamicCache, width: int) -> DynamicCache:
    """Padding before the columns of `cache`, up to `width`; in place."""
    for layer in plain_layers(cache):
        more = width - layer.keys.shape[2]
        if more:
            layer.keys = torch.nn.functional.pad(layer.keys, (0, 0, more, 0))
            layer.values = torch.nn.functional.pad(layer.values, (0, 0, more, 0))
    return cache


def _beside(cache: DynamicCache, other: DynamicCache) -> DynamicCache:
    """The rows of `other` after those of `cache`, which are equally wide; in place."""
    for layer, more in zip(plain_layers(cache), plain_layers(other), strict=True):
        layer.keys, layer.values = torch.cat([layer.keys, more.keys]), torch.cat([layer.values, more.values])
    return cache
