"""How likely given continuations are after given contexts, under one or several specs.

Benchmarks repeat themselves: contexts begin with the same examples, choices follow the same context, and specs share
every block below their lowest edit. Each of the three is run once: what contexts begin with fills a key-value cache,
contexts go on from copies of it and continuations from copies of theirs, and the blocks up to the lowest edit run for
the first spec alone. What comes out is what one forward pass for each request gives.

A continuation counts as written by the model: `generation` steers its tokens, `prompt` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from demur.errors import InputError
from demur.eval.families import Context, cheapest_batches, families
from demur.lm.attach import Generation, generation
from demur.lm.batches import Row, pad
from demur.lm.caches import cache_argument
from demur.lm.hookpoints import block_at
from demur.lm.load import LanguageModel
from demur.lm.record import Reading, resume
from demur.sae.base import Sae
from demur.sae.store import LoadedSae
from demur.spec import SteeringSpec
from demur.steering.edits_at import lowest_hookpoint
from demur.steering.steer import steer
from demur.steering.vectors import Vector
from demur.types import Hookpoint

_BATCHES = 16
"""Full batches that go on from one cache; the residuals of all of them are kept for the other specs."""
_PASS = {"cpu": 50, "cuda": 2000}
"""Tokens that could be run in the time that a pass costs for being one: padding up to that is no waste."""
_LOGITS = 1 << 26
"""Logits computed at once: 256 MB in float32."""


class Request(NamedTuple):
    """What is asked. Neither part may be empty."""

    context: Row
    continuation: Row


class Score(NamedTuple):
    """How likely a continuation is after its context."""

    log_prob: float
    """Of all its tokens together, in nats."""
    greedy: bool
    """Each of its tokens is the likeliest one."""


def log_likelihoods(
    lm: LanguageModel,
    requests: Sequence[Request],
    specs: Sequence[SteeringSpec],
    saes: Mapping[str, Sae] | Sequence[LoadedSae] = (),
    batch_size: int = 16,
    advance: Callable[[float], None] = lambda amount: None,
    directions: Sequence[Vector] = (),
) -> list[list[Score]]:
    """For each of `specs` the score of every request, in their order. At most `batch_size` rows are run at once.

    `advance` is told of every request under every spec. Whatever else is attached to the model stays in force. Raises
    `InputError` for a request with an empty part, and as `steer` does.
    """
    if not all(request.context and request.continuation for request in requests):
        raise InputError("a context or continuation to be scored is empty; both need at least one token")
    of_context: dict[Context, list[int]] = {}
    for number, request in enumerate(requests):
        of_context.setdefault(tuple(request.context), []).append(number)
    found = [[Score(0.0, False)] * len(requests) for _ in specs]
    for family in families(of_context, batch_size * _BATCHES):
        texts = [_Text(context, [requests[i].continuation for i in of_context[context]]) for context in family.contexts]
        passes = _Passes(lm, lowest_hookpoint(specs) if len(specs) > 1 else None)
        for spec, scores in zip(specs, found, strict=True):
            with steer(lm, spec, saes, directions=directions):
                for batch in _scores(lm, passes, family.shared, texts, batch_size):
                    for context, some in batch:
                        for number, score in zip(of_context[context], some, strict=True):
                            scores[number] = score
                    advance(sum(len(some) for _, some in batch))
            passes.again()
    return found


class _Passes:
    """Passes of the model, and, after `again`, the same passes once more from the hookpoint up."""

    def __init__(self, lm: LanguageModel, hookpoint: Hookpoint | None) -> None:
        self._lm, self._hookpoint = lm, hookpoint
        self._readings: list[Reading] = []
        self._next = 0
        self._repeat = False

    def again(self) -> None:
        """The next pass is the first one again, under another spec, with caches of its own."""
        self._next, self._repeat = 0, self._hookpoint is not None

    def __call__(self, ids: Tensor, mask: Tensor, cache: DynamicCache, keep: int) -> Tensor:
        """Logits [batch, keep, vocab] (all columns if 0) of `ids` [batch, pos], which go into the cache.

        `mask` [batch, past + pos] as for any model.
        """
        with torch.no_grad(), self._below():
            logits: Tensor = self._lm.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                use_cache=True,
                logits_to_keep=keep,
                **{cache_argument(self._lm.model): cache},
            ).logits
        if self._repeat and self._hookpoint:
            # blocks that were skipped cached nothing, but from their caches the model tells how far the text is
            nothing = torch.zeros(len(ids), 1, ids.shape[1], 1, device=ids.device)
            for block in range(self._hookpoint.block + 1):
                cache.update(nothing, nothing, block)
        return logits

    def _below(self) -> AbstractContextManager[None]:
        """What the blocks up to the hookpoint do in the next pass."""
        if self._hookpoint is None:
            return nullcontext()
        if not self._repeat:
            return _recorded(self._lm.model, self._hookpoint, self._readings)
        self._next += 1
        return resume(self._lm.model, self._hookpoint, self._readings[self._next - 1])


@contextmanager
def _recorded(model: PreTrainedModel, hookpoint: Hookpoint, readings: list[Reading]) -> Iterator[None]:
    """What the block of `hookpoint` gives before any hook sees it is added to `readings`."""
    block = block_at(model, hookpoint)
    before, inner = block.__dict__.get("forward"), block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        is_tuple = isinstance(output, tuple)
        readings.append(Reading(output[0] if is_tuple else output, is_tuple))
        return output

    block.forward = forward
    try:
        yield
    finally:
        block.__dict__.pop("forward", None)
        if before is not None:
            block.forward = before


class _Text(NamedTuple):
    """A context and what may follow it."""

    context: Context
    continuations: list[Row]


def _scores(
    lm: LanguageModel, passes: _Passes, shared: int, texts: Sequence[_Text], batch_size: int
) -> Iterator[list[tuple[Context, list[Score]]]]:
    """Batch by batch, each context of `texts`, which have their first `shared` tokens in common, and its
    continuations' scores."""
    window = getattr(lm.model.config.get_text_config(), "sliding_window", None)
    if window and max(map(_length, texts)) > window:
        batch_size = 1  # padding inside a row would count as text that a window has room for
    # to what is attached each continuation is a row of one call; a context stands for all of its own
    rows = [list(range(end - len(t.continuations), end)) for t, end in zip(texts, _ends(texts), strict=True)]
    lengths = torch.tensor([len(text.context) for text in texts for _ in text.continuations], device=lm.device)
    with generation(lm.model, Generation(len(lengths), lengths)) as about:
        cache = DynamicCache(config=lm.model.config)
        if shared:
            prefix = torch.tensor([texts[0].context[:shared]], device=lm.device)
            about.rows, about.stands = torch.arange(len(lengths), device=lm.device), torch.zeros_like(lengths)
            passes(prefix, torch.ones_like(prefix), cache, keep=1)
        pass_cost = _PASS.get(lm.device.type, _PASS["cuda"])
        for batch in cheapest_batches([_length(text) - shared for text in texts], batch_size, pass_cost):
            padded = pad(lm, [texts[i].context[shared:] for i in batch], side="left")
            mask = torch.nn.functional.pad(padded.mask, (shared, 0), value=1)
            others = [(place, row) for place, i in enumerate(batch) for row in rows[i][1:]]
            about.rows = torch.tensor([*(rows[i][0] for i in batch), *(row for _, row in others)], device=lm.device)
            about.stands = torch.tensor([*range(len(batch)), *(place for place, _ in others)], device=lm.device)
            own = _branch(cache, [0] * len(batch))
            ends = passes(padded.ids, mask, own, keep=1)[:, -1].float().log_softmax(-1)
            leaves = [
                _Leaf(place, row, continuation)
                for place, i in enumerate(batch)
                for row, continuation in zip(rows[i], texts[i].continuations, strict=True)
            ]
            first = _first(ends, leaves)
            long = [leaf for leaf in leaves if len(leaf.continuation) > 1]
            for part in cheapest_batches([len(leaf.continuation) for leaf in long], batch_size, pass_cost):
                some = [long[i] for i in part]
                about.rows, about.stands = torch.tensor([leaf.row for leaf in some], device=lm.device), None
                for leaf, rest in zip(some, _rest(lm, passes, mask, own, some), strict=True):
                    begun = first[leaf.row]
                    first[leaf.row] = Score(begun.log_prob + rest.log_prob, begun.greedy and rest.greedy)
            yield [(texts[i].context, [first[row] for row in rows[i]]) for i in batch]


def _length(text: _Text) -> int:
    """Tokens of a context with the longest of its continuations."""
    return len(text.context) + max(map(len, text.continuations))


def _ends(texts: Sequence[_Text]) -> Iterator[int]:
    """Where the continuations of each text end, counted over all texts."""
    return accumulate(len(text.continuations) for text in texts)


class _Leaf(NamedTuple):
    """A continuation in a batch."""

    place: int
    """Of its context in the batch."""
    row: int
    continuation: Row


def _first(ends: Tensor, leaves: Sequence[_Leaf]) -> dict[int, Score]:
    """By row the score of each continuation's first token; `ends` [batch, vocab] are log-probabilities."""
    places = torch.tensor([leaf.place for leaf in leaves], device=ends.device)
    tokens = torch.tensor([leaf.continuation[0] for leaf in leaves], device=ends.device)
    sums = ends[places, tokens].double().tolist()
    greedy = (ends.argmax(-1)[places] == tokens).tolist()
    return {leaf.row: Score(*score) for leaf, *score in zip(leaves, sums, greedy, strict=True)}


def _rest(
    lm: LanguageModel, passes: _Passes, mask: Tensor, cache: DynamicCache, leaves: Sequence[_Leaf]
) -> list[Score]:
    """The scores of all tokens but the first; `mask` and `cache` are those of the contexts."""
    read = pad(lm, [leaf.continuation[:-1] for leaf in leaves], side="right")
    wanted = pad(lm, [leaf.continuation[1:] for leaf in leaves], side="right").ids
    places = [leaf.place for leaf in leaves]
    own = _branch(cache, places)
    whole = torch.cat([mask[places], read.mask], dim=1)
    sums = torch.zeros(len(leaves), dtype=torch.float64, device=wanted.device)
    greedy = torch.ones(len(leaves), dtype=torch.bool, device=wanted.device)
    step = max(1, _LOGITS // (len(leaves) * lm.model.config.get_text_config().vocab_size))
    for start in range(0, wanted.shape[1], step):
        columns = slice(start, start + step)
        logits = passes(read.ids[:, columns], whole[:, : mask.shape[1] + start + step], own, keep=0)
        log_probs = logits.float().log_softmax(-1)
        found = log_probs.gather(-1, wanted[:, columns, None]).squeeze(-1).double()
        sums += (found * read.mask[:, columns]).sum(-1)
        greedy &= ((log_probs.argmax(-1) == wanted[:, columns]) | (read.mask[:, columns] == 0)).all(-1)
    return [Score(*score) for score in zip(sums.tolist(), greedy.tolist(), strict=True)]


def _branch(cache: DynamicCache, places: Sequence[int]) -> DynamicCache:
    """Rows `places` of a cache, which itself stays as it is: layers replace their tensors, never write into them."""
    branch = copy(cache)
    branch.layers = [copy(layer) for layer in cache.layers]
    branch.batch_select_indices(torch.tensor(places))
    return branch
