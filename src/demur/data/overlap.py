"""Prompts that occur, word for word or nearly, in another set: what is trained on must not be what is reported."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

_WORDS = 3
_NEARLY = 0.5
"""Share of the word trigrams of either that two prompts have in common (Jaccard) from which on they are one."""

Grams = frozenset[tuple[str, ...]]


def _grams(text: str) -> Grams:
    """Word trigrams, case and punctuation left out; all words as one for a shorter text."""
    words = re.findall(r"\w+", text.lower())
    return frozenset(tuple(words[i : i + _WORDS]) for i in range(max(1, len(words) - _WORDS + 1)))


class Held:
    """Texts that are held out."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._grams = [_grams(text) for text in texts]
        self._by_gram: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, grams in enumerate(self._grams):
            for gram in grams:
                self._by_gram[gram].append(number)

    def __contains__(self, text: object) -> bool:
        """Whether the text, or nearly it, is among them."""
        grams = _grams(str(text))
        near = {number for gram in grams for number in self._by_gram.get(gram, ())}
        return any(len(grams & self._grams[i]) >= _NEARLY * len(grams | self._grams[i]) for i in near)
