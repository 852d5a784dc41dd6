"""Choose the latent that mediates refusal, on judged generations of the select split.

The score of a finalist is the share of harmful prompts it makes the model refuse minus the share of plain prompts it
makes the model refuse, under the same clamp. Nothing that is reported is looked at here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from demur.types import LatentRanking, LatentScore


class Tried(NamedTuple):
    """What judged generations under one clamped finalist came to."""

    latent: int
    harmful_refused: float
    """Share of harmful select prompts fully refused."""
    benign_refused: float
    """Share of plain select prompts refused, fully or partly."""


def rank_finalists(screened: LatentRanking, tried: Sequence[Tried]) -> LatentRanking:
    """The screen's ranking with its finalists put first, in order of causal score; the screen breaks ties."""
    by_latent = {score.latent: score for score in screened.scores}
    finalists = [
        LatentScore(
            one.latent,
            one.harmful_refused - one.benign_refused,
            {
                **by_latent[one.latent].detail,
                "harmful_refused": one.harmful_refused,
                "benign_refused": one.benign_refused,
            },
        )
        for one in tried
    ]
    finalists.sort(key=lambda s: (-s.score, -s.detail["screen"]))
    names = {one.latent for one in tried}
    rest = tuple(score for score in screened.scores if score.latent not in names)
    return LatentRanking(
        "archetype, screen, judged generations",
        screened.hookpoint,
        screened.sae,
        screened.prompts,
        (*finalists, *rest),
    )
