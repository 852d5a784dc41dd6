"""Log-probabilities as OpenAI's API writes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from demur.lm.sampling import Sampling
from demur.serve import protocol as p
from demur.serve.engine import Piece


class Words(NamedTuple):
    """How an answer is written down."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    """As a turn of a conversation; else as plain text."""

    def of(self, token: int) -> str:
        """A token's own text."""
        return str(self.tokenizer.decode([token]))

    def bytes_of(self, token: int) -> list[int]:
        """The bytes of a token, also where it is a part of a character."""
        text = self.of(token)
        if "�" not in text:
            return list(text.encode())
        raw = str(self.tokenizer.convert_ids_to_tokens(token))
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", raw):
            return [int(raw[3:5], 16)]
        table = _byte_level()
        return [table[mark] for mark in raw] if all(mark in table for mark in raw) else list(text.encode())


@cache
def _byte_level() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    return {mark: byte for byte, mark in bytes_to_unicode().items()}


def chat_logprobs(words: Words, sampling: Sampling, pieces: Sequence[Piece]) -> p.ChatLogprobs | None:
    """Of the tokens of `pieces`; None where they were not asked for."""
    if sampling.top_logprobs is None:
        return None
    found = []
    for piece in pieces:
        if piece.ends_turn:
            continue
        token = words.of(piece.drawn.token)
        tops = [
            p.TopLogprob(token=words.of(one), logprob=value, bytes=words.bytes_of(one))
            for one, value in piece.drawn.top
        ]
        found.append(
            p.TokenLogprob(
                token=token,
                logprob=piece.drawn.logprob or 0.0,
                bytes=words.bytes_of(piece.drawn.token),
                top_logprobs=tops,
            )
        )
    return p.ChatLogprobs(content=found)


def text_logprobs(words: Words, sampling: Sampling, pieces: Sequence[Piece], offset: int = 0) -> p.TextLogprobs | None:
    """The same in the form of `/v1/completions`; `offset`: characters that came before."""
    if sampling.top_logprobs is None:
        return None
    found = p.TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for piece in pieces:
        if piece.ends_turn:
            continue
        found.tokens.append(words.of(piece.drawn.token))
        found.token_logprobs.append(piece.drawn.logprob or 0.0)
        found.top_logprobs.append({words.of(one): value for one, value in piece.drawn.top})
        found.text_offset.append(offset)
        offset += len(found.tokens[-1])
    return found
