"""Choose the latent that mediates refusal, on judged generations of the select split.

The score of a finalist is the share of harmful prompts that the model fully refuses under its clamp, as in the paper
(O'Brien et al., arXiv 2411.11296): the study asks first what the strongest latent buys, then what it costs. Among
equals fewer refusals of plain prompts win, then the screen. Nothing that is reported is looked at here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from demur.types import LatentRanking, LatentScore


class Tried(NamedTuple):
    """What judged generations under one clamped finalist came to."""

    latent: int
    harmful_refused: float
    """Share of harmful select prompts fully refused."""
    benign_refused: float | None
    """Share of plain select prompts refused, fully or partly; None where it was not needed to decide."""


def rank_finalists(screened: LatentRanking, tried: Sequence[Tried]) -> LatentRanking:
    """The screen's ranking with its finalists put first, in order of causal score; the screen breaks ties."""
    by_latent = {score.latent: score for score in screened.scores}

    def judged(one: Tried) -> LatentScore:
        found = {"harmful_refused": one.harmful_refused}
        if one.benign_refused is not None:
            found["benign_refused"] = one.benign_refused
        return LatentScore(one.latent, one.harmful_refused, {**by_latent[one.latent].detail, **found})

    finalists = [judged(one) for one in tried]
    finalists.sort(key=lambda s: (-s.score, s.detail.get("benign_refused", 0.0), -s.detail["screen"]))
    names = {one.latent for one in tried}
    return replace(
        screened,
        method="archetype, screen, judged generations",
        scores=(*finalists, *(score for score in screened.scores if score.latent not in names)),
    )
