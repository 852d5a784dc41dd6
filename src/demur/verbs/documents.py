"""Documents as rows of typed tokens, for training and measuring SAEs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from demur import progress
from demur.data.corpus import Corpus, Document
from demur.errors import InputError
from demur.lm.load import LanguageModel
from demur.lm.token_types import TYPES, Typed, typed_chat, typed_text

_BYTES = 4
"""Bytes of text that a token takes, roughly."""
_TEMPLATE = TYPES.index("template")


def rows(lm: LanguageModel, document: Document, context: int) -> list[Typed]:
    """`document` as the model reads it: the first `context` tokens of a conversation, all of a plain text in pieces.

    Each piece begins with the special tokens that the tokenizer puts before a text. Pieces of fewer than two tokens
    are left out.
    """
    if document.messages:
        typed = typed_chat(lm, document.messages)
        cut = [Typed(typed.ids[:context], typed.types[:context])]
    else:
        typed = typed_text(lm, document.text)
        head = next((i for i, kind in enumerate(typed.types) if kind != _TEMPLATE), 0)
        step = max(context - head, 1)
        cut = [
            Typed([*typed.ids[:head], *typed.ids[i : i + step]], [*typed.types[:head], *typed.types[i : i + step]])
            for i in range(head, len(typed.ids), step)
        ]
    return [row for row in cut if len(row.ids) >= 2]


def some_rows(lm: LanguageModel, files: Sequence[Path], context: int, max_tokens: int, seed: int) -> list[Typed]:
    """Rows of documents of `files` in shuffled order, `max_tokens` at most. Raises as `Corpus` does, and `InputError`
    when there is none."""
    found: list[Typed] = []
    left = max_tokens
    for document in Corpus(files, seed=seed):
        for row in rows(lm, document, context):
            if len(row.ids) > left:
                return _any(found)
            found.append(row)
            left -= len(row.ids)
    return _any(found)


def _any(found: list[Typed]) -> list[Typed]:
    if not found:
        raise InputError("the text files hold no document of at least two tokens; give more text")
    return found


class Split(NamedTuple):
    """Documents to train on and others to measure on."""

    trained: list[int]
    heldout: list[int]
    tokens: int
    """Of the documents to train on."""
    sources: dict[str, int]
    """Documents by source, with its licence where the rows name one; of all the documents taken."""


def split(lm: LanguageModel, corpus: Corpus, context: int, max_tokens: int, heldout: float) -> Split:
    """The first documents of `corpus` that make `max_tokens`, every so-manieth of them held out.

    Raises `InputError` where that leaves none on either side.
    """
    every = max(2, round(1 / heldout))
    taken: tuple[list[int], list[int]] = ([], [])
    sources: Counter[str] = Counter()
    left, tokens = max_tokens, 0
    with progress.track("count tokens", len(corpus), "documents") as advance:
        for number, document in enumerate(corpus):
            advance(1)
            size = sum(len(row.ids) for row in rows(lm, document, context))
            if size > left:
                break
            if not size:
                continue
            left -= size
            held = sum(map(len, taken)) % every == 0
            taken[held].append(number)
            tokens += 0 if held else size
            sources[document.source] += 1
    trained, kept = taken
    if not trained:
        raise InputError(f"{len(kept)} documents of two tokens or more leave none to train on; give more text")
    return Split(trained, kept, tokens, dict(sorted(sources.items())))


def groups(corpus: Corpus, numbers: Sequence[int], tokens: int) -> list[list[int]]:
    """`numbers` in runs of about `tokens` tokens each, judged by size in bytes; at least two documents a run."""
    found: list[list[int]] = [[]]
    size = 0
    for number in numbers:
        if size >= tokens and len(found[-1]) > 1:
            found.append([])
            size = 0
        found[-1].append(number)
        size += corpus.size(number) // _BYTES
    return found


def read_group(lm: LanguageModel, corpus: Corpus, numbers: Sequence[int], context: int) -> list[Typed]:
    """All rows of the documents `numbers`."""
    return [row for number in numbers for row in rows(lm, corpus[number], context)]
