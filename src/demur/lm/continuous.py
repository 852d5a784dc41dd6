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
from demur.lm.sampling import Drawn, Draws, Sampling, broken, draw

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
    broken: bool = False
    """The model gave no numbers for this row, and nothing was drawn; it is the last."""


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
        cache, mask = DynamicCache(), padded.mask
        tokens = self._pass(rows, padded.ids, mask, cache)
        if self._rows:
            cache = _beside(self._cache, cache)
            width = max(mask.shape[1], self._mask.shape[1])
            mask = torch.cat([_padded(self._mask, width), _padded(mask, width)])
        after = torch.cat([self._next, self._column(tokens)])
        # nothing has changed until here
        self._cache, self._mask, self._next = cache, mask, after
        self._rows = [*self._rows, *rows]
        del self._free[-len(wanted) :]
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
        logits = logits.float()
        wrong = broken(logits).tolist()
        found = []
        for row, drawn, bad in zip(rows, draw(logits, [row.draws for row in rows]), wrong, strict=True):
            row.new += 1
            stopped = drawn.token in lm.eos_ids and not bad
            last = stopped or bad or row.new >= row.draws.sampling.max_new_tokens
            found.append(Token(row.slot, drawn, last, stopped, bad))
        return found

    def _column(self, tokens: Sequence[Token]) -> Tensor:
        return torch.tensor([[token.drawn.token] for token in tokens], device=self._mask.device)

    def _leave(self, tokens: list[Token]) -> list[Token]:
        self.drop([token.slot for token in tokens if token.last])
        return tokens


def _padded(mask: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask, (width - mask.shape[1], 0))


def _beside(cache: DynamicCache, other: DynamicCache) -> DynamicCache:
    """A cache with the rows of `other` after those of `cache`, the narrower one padded on the left."""
    found = DynamicCache()
    for i, (one, two) in enumerate(zip(plain_layers(cache), plain_layers(other), strict=True)):
        width = max(one.keys.shape[2], two.keys.shape[2])
        keys, values = (
            torch.cat([torch.nn.functional.pad(x, (0, 0, width - x.shape[2], 0)) for x in pair])
            for pair in ((one.keys, two.keys), (one.values, two.values))
        )
        found.update(keys, values, i)
    return found


def write(lm: LanguageModel, rows: Sequence[Row], sampling: Sampling, slots: int) -> list[list[int]]:
    """Answers to `rows` as token ids, each drawn by itself, at most `slots` at once; the end-of-turn token left off."""
    batch = Continuous(lm, slots)
    left = list(range(len(rows)))[::-1]
    found: list[list[int]] = [[] for _ in rows]
    of: dict[int, int] = {}
    while left or batch.running:
        some = [left.pop() for _ in range(min(len(left), batch.free))]

        def wanted(number: int) -> Wanted:
            return Wanted(rows[number], sampling, lambda slot: of.update({slot: number}))

        tokens = batch.join([wanted(number) for number in some])
        for token in (*tokens, *batch.step()):
            if not token.stopped and not token.broken:
                found[of[token.slot]].append(token.drawn.token)
    return found
