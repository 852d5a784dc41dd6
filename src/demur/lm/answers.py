"""Answers to any number of rows, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from demur.lm.batches import Row, batches
from demur.lm.generate import Answer, generate
from demur.lm.load import LanguageModel


def answers(
    lm: LanguageModel,
    rows: Sequence[Row],
    max_new_tokens: int,
    batch_size: int,
    advance: Callable[[float], None] = lambda amount: None,
) -> list[Answer]:
    """Greedy answers to `rows` of token ids, in their order, at most `batch_size` at a time. None is kept on disk."""
    found: dict[int, Answer] = {}
    for batch in batches([len(row) for row in rows], batch_size):
        found |= zip(batch, generate(lm, [rows[i] for i in batch], max_new_tokens), strict=True)
        advance(len(batch))
    return [found[i] for i in range(len(rows))]
