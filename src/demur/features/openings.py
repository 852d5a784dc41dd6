"""How this model begins a refusal: tokens that tell a refusal from an answer, read off what the model itself said.

No list of phrases: an opening is the shortest beginning of a refused answer that (nearly) no other answer begins with.
Their probabilities add up to that of refusing (`log_odds`), from a handful of forward tokens and without generating.
What it does not show: whether the answer goes on as a refusal ("I'm sorry, but I'm a doctor"), or a refusal in words
that the unsteered model never used. Judged generations have the last word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from demur.errors import InputError

PURE = 0.9
"""Share of the answers with a beginning that are refusals, at least."""
LONGEST = 8
"""Tokens of an opening at most."""
MOST = 12
"""Openings kept, those that most refusals begin with first."""
LEAST = 2
"""Refusals that begin with an opening, at least: one of a kind ("The racist") is an accident of its prompt."""


@dataclass(frozen=True)
class Openings:
    """Beginnings of refusals, none of them the beginning of another."""

    tokens: tuple[tuple[int, ...], ...]
    """Token ids of each."""
    counts: tuple[int, ...]
    """Refusals that begin with each."""
    refusals: int
    """Refusals that were read."""

    @property
    def branches(self) -> tuple[tuple[int, ...], ...]:
        """What must be read after a prompt to score all openings: all but the last token of each, once, and no
        beginning of another."""
        stems = sorted({opening[:-1] for opening in self.tokens})
        # in this order what begins another stands right before one that it begins
        inner = {stem for stem, after in pairwise(stems) if after[: len(stem)] == stem}
        return tuple(stem for stem in stems if stem not in inner)

    def log_odds(self, scored: Sequence[Tensor]) -> Tensor:
        """Log-odds [n] that an answer begins with one of the openings.

        `scored`: for each of `branches` log-probabilities [n, length + 1, vocab] of its tokens and what follows it.
        """
        parts = [self._steps(opening, scored).sum(-1) for opening in self.tokens]
        log_p = torch.stack(parts).logsumexp(0).double().clamp(max=-1e-9)
        return log_p - torch.log(-torch.expm1(log_p))

    def output_scores(self, scored: Sequence[Tensor]) -> Tensor:
        """[n] largest of (1 - rank / vocabulary) x probability over the openings, the rank being that of the opening's
        last token after the others."""
        found = []
        for opening in self.tokens:
            steps = self._steps(opening, scored)
            number, last = self._branch(opening), len(opening) - 1
            rank = (scored[number][..., last, :] > steps[..., -1:]).sum(-1)
            found.append((1 - rank / scored[number].shape[-1]) * steps.sum(-1).exp())
        return torch.stack(found).amax(0).double()

    def _branch(self, opening: tuple[int, ...]) -> int:
        stem = opening[:-1]
        return next(i for i, branch in enumerate(self.branches) if branch[: len(stem)] == stem)

    def _steps(self, opening: tuple[int, ...], scored: Sequence[Tensor]) -> Tensor:
        """[n, tokens] log-probability of each token of `opening`."""
        there = scored[self._branch(opening)]
        steps = torch.arange(len(opening), device=there.device)
        return there[..., steps, torch.tensor(opening, device=there.device)]


def find_openings(refusals: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> Openings:
    """Openings of `refusals`, told apart from `others`: token ids of answers.

    Each begins at least two refusals; where none does, those of single refusals are kept.

    Raises `InputError` where no refusal begins otherwise than the other answers.
    """
    said = Counter(tuple(ids[:n]) for ids in refusals for n in range(1, LONGEST + 1) if n <= len(ids))
    also = Counter(tuple(ids[:n]) for ids in others for n in range(1, LONGEST + 1) if n <= len(ids))
    found: Counter[tuple[int, ...]] = Counter()
    for ids in refusals:
        beginnings = [tuple(ids[:n]) for n in range(1, min(LONGEST, len(ids)) + 1)]
        pure = next((b for b in beginnings if said[b] >= PURE * (said[b] + also[b])), None)
        if pure is not None:
            found[pure] += 1
    if not found:
        raise InputError(
            f"none of {len(refusals)} refusals begins otherwise than the {len(others)} other answers, so refusing "
            "cannot be scored by how answers begin; give a refusal of the model's in `refusal`"
        )
    common = {tokens: count for tokens, count in found.items() if count >= LEAST}
    kept = sorted((common or found).items(), key=lambda item: (-item[1], item[0]))[:MOST]
    return Openings(tuple(tokens for tokens, _ in kept), tuple(count for _, count in kept), len(refusals))


def usual_refusal(refusals: Sequence[str]) -> str:
    """The first sentence that most of `refusals` begin with, the shortest on a tie; empty without any.

    A refusal in the model's own words: latents of a wording that it never uses would be found with another.
    """
    first = Counter(re.split(r"(?<=[.!?])\s", text.strip())[0] for text in refusals)
    return min(first, key=lambda text: (-first[text], len(text), text), default="")
