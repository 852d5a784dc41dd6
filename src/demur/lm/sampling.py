"""The next token of each row of a batch, every row by its own settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from demur.errors import InputError

_MOST_BIASED = 1024
_GREEDY = 1e-5
"""Temperatures below this one take the likeliest token: dividing by them leaves nothing else, or overflows."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are drawn."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the likeliest token; above, samples."""
    top_p: float = 1.0
    """Share of the probability that is sampled from."""
    top_k: int = 0
    """Of so many likeliest tokens; 0 for all."""
    seed: int | None = None
    """None draws one."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the answer has already."""
    frequency_penalty: float = 0.0
    """Taken from it once for every time that the answer has it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of token ids."""
    top_logprobs: int | None = None
    """Log-probabilities are wanted: of the chosen token and of so many likeliest ones."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if len(self.logit_bias) > _MOST_BIASED:
            raise InputError(f"logit_bias has {len(self.logit_bias)} tokens, expected at most {_MOST_BIASED}")
        if not 0 <= self.temperature < inf or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise InputError(
                f"temperature is {self.temperature:g}, top_p {self.top_p:g} and top_k {self.top_k}; expected 0 or "
                "more, a share above 0, and 0 or more"
            )


class Drawn(NamedTuple):
    """A token, and how likely it was."""

    token: int
    logprob: float | None = None
    """In nats, of the model's own distribution: before temperature, bias and penalties. None where not asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, likeliest first."""


class Draws:
    """The settings of one answer, and what its next token depends on besides the logits."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = Random(sampling.seed)
        self._times: dict[int, int] = {}
        self._biased = list(sampling.logit_bias)
        self._bias = torch.tensor(list(sampling.logit_bias.values()))
        self.plain = not (sampling.presence_penalty or sampling.frequency_penalty or sampling.logit_bias)
        """The logits are taken as they come."""

    def adjust(self, logits: Tensor) -> None:
        """Bias and penalise `logits` [vocab], in place."""
        s = self.sampling
        if self._biased:
            logits[self._biased] += self._bias.to(logits)
        if self._times:
            penalties = [s.presence_penalty + times * s.frequency_penalty for times in self._times.values()]
            logits[list(self._times)] -= torch.tensor(penalties).to(logits)

    def pick(self) -> float:
        """The next number from 0 to 1."""
        return self._random.random()

    def took(self, token: int) -> None:
        """Remember the token that was drawn."""
        if self.sampling.presence_penalty or self.sampling.frequency_penalty:
            self._times[token] = self._times.get(token, 0) + 1


def broken(logits: Tensor) -> Tensor:
    """[batch] bool: rows of `logits` [batch, vocab] that hold no number, as after an edit that is far too large."""
    return ~logits.isfinite().any(-1) | logits.isnan().any(-1)


def draw(logits: Tensor, rows: Sequence[Draws]) -> list[Drawn]:
    """The next token of each row of `logits` [batch, vocab] (float32; may be changed).

    A row's draw depends on its own logits, settings and earlier draws only, not on who else is in the batch. Logits
    that are no numbers give token 0, see `broken`.
    """
    logits.nan_to_num_(nan=0.0)
    told = {i: _told(logits[i], row) for i, row in enumerate(rows) if row.sampling.top_logprobs is not None}
    for i, row in enumerate(rows):
        if not row.plain:
            row.adjust(logits[i])
    chosen = logits.argmax(dim=-1)
    if sampled := [i for i, row in enumerate(rows) if row.sampling.temperature >= _GREEDY]:
        at = torch.tensor(sampled, device=logits.device)
        chosen[at] = _sampled(logits[at], [rows[i] for i in sampled])
    found = []
    for i, token in enumerate(chosen.tolist()):
        rows[i].took(token)
        if i in told:
            log_probs, top = told[i]
            found.append(Drawn(token, float(log_probs[token]), top))
        else:
            found.append(Drawn(token))
    return found


def _told(logits: Tensor, row: Draws) -> tuple[Tensor, tuple[tuple[int, float], ...]]:
    log_probs = logits.log_softmax(-1)
    values, tokens = log_probs.topk(row.sampling.top_logprobs or 0)
    return log_probs, tuple(zip(tokens.tolist(), values.tolist(), strict=True))


def _sampled(logits: Tensor, rows: Sequence[Draws]) -> Tensor:
    """[batch] token ids, by one number a row against the cumulated probabilities, likeliest first."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device).unsqueeze(1)

    ordered, tokens = (logits / column([row.sampling.temperature for row in rows])).sort(dim=-1, descending=True)
    rank = torch.arange(ordered.shape[1], device=logits.device)
    top_k = column([row.sampling.top_k or ordered.shape[1] for row in rows])
    probs = ordered.softmax(-1).masked_fill(rank >= top_k, 0.0)
    probs = probs / probs.sum(-1, keepdim=True)
    # a token stays if the likelier ones do not reach the share without it; the likeliest always does
    beyond = probs.cumsum(-1) - probs >= column([row.sampling.top_p for row in rows])
    beyond[:, 0] = False
    probs = probs.masked_fill(beyond, 0.0)
    total = probs.cumsum(-1)
    wanted = column([row.pick() for row in rows]) * total[:, -1:]
    place = torch.searchsorted(total, wanted, right=True).clamp(max=total.shape[1] - 1)
    # rounding may point past the last token that is left
    place = torch.minimum(place, ((probs > 0).sum(-1, keepdim=True) - 1).clamp(min=0))
    return tokens.gather(1, place).squeeze(1)
