"""Log-probabilities as OpenAI's API writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

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


def chat_logprobs(words: Words, sampling: Sampling, pieces: Sequence[Piece]) -> p.ChatLogprobs | None:
    """Of the tokens of `pieces`; None where they were not asked for."""
    if sampling.top_logprobs is None:
        return None
    found = []
    for piece in pieces:
        token = words.of(piece.drawn.token)
        tops = [(words.of(one), value) for one, value in piece.drawn.top]
        found.append(
            p.TokenLogprob(
                token=token,
                logprob=piece.drawn.logprob or 0.0,
                bytes=list(token.encode()),
                top_logprobs=[p.TopLogprob(token=t, logprob=v, bytes=list(t.encode())) for t, v in tops],
            )
        )
    return p.ChatLogprobs(content=found)


def text_logprobs(words: Words, sampling: Sampling, pieces: Sequence[Piece], offset: int = 0) -> p.TextLogprobs | None:
    """The same in the form of `/v1/completions`; `offset`: characters that came before."""
    if sampling.top_logprobs is None:
        return None
    found = p.TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for piece in pieces:
        found.tokens.append(words.of(piece.drawn.token))
        found.token_logprobs.append(piece.drawn.logprob or 0.0)
        found.top_logprobs.append({words.of(one): value for one, value in piece.drawn.top})
        found.text_offset.append(offset)
        offset += len(piece.text)
    return found
