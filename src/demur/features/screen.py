"""The causal screen: what each candidate makes of the first words of an answer, on few prompts.

As in the paper (O'Brien et al., arXiv 2411.11296) every candidate is clamped and what the model then says is judged;
here on few prompts and few tokens, and on prompts that the model answers by itself, since only those can change. A
screen ranks; the choice is made on more prompts and whole answers (`demur.features.choose`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from demur.types import LatentRanking, LatentScore


def rank_screened(found: LatentRanking, refused: Mapping[int, float], prompts: str) -> LatentRanking:
    """Candidates in order of `refused`, the share of screened prompts that each made the model refuse.

    Equals keep the order in which they were proposed. `prompts`: hash of the prompts that were looked at.
    """

    def screened(one: LatentScore) -> LatentScore:
        share = refused[one.latent]
        return LatentScore(one.latent, share, {"screen": share, "refusal_tokens": one.score, **one.detail})

    scores = sorted((one for one in found.scores if one.latent in refused), key=lambda one: -refused[one.latent])
    return replace(found, method="archetype, screen", scores=tuple(screened(one) for one in scores), prompts=prompts)
