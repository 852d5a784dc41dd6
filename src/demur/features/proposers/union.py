"""Several proposers as one: reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009).

A latent's score is the sum over methods of 1 / (60 + its place). What several methods place high comes first, and what
one of them places first is not lost. It inherits what its members do not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from demur.errors import InputError
from demur.types import LatentRanking, LatentScore, stable_hash

_K = 60
"""The paper's constant: how little the very first places weigh."""


def union(rankings: Sequence[LatentRanking]) -> LatentRanking:
    """All latents of `rankings`; the place under each method stands in the detail.

    Raises `InputError` without any, for two by one method, and for latents of different SAEs.
    """
    methods = [one.method for one in rankings]
    if not rankings or len(set(methods)) < len(methods) or len({(one.hookpoint, one.sae) for one in rankings}) > 1:
        raise InputError(
            f"rankings by {', '.join(methods) or 'no method'} cannot be joined; give rankings of one SAE at one "
            "hookpoint, each by a method of its own"
        )
    places = {one.method: {score.latent: place for place, score in enumerate(one.scores, 1)} for one in rankings}
    latents = {latent for found in places.values() for latent in found}

    def fused(latent: int) -> LatentScore:
        have = {method: float(found[latent]) for method, found in places.items() if latent in found}
        return LatentScore(latent, sum(1 / (_K + place) for place in have.values()), have)

    scores = sorted((fused(latent) for latent in latents), key=lambda one: (-one.score, one.latent))
    prompts = stable_hash([one.prompts for one in rankings])
    return replace(rankings[0], method="union", prompts=prompts, scores=tuple(scores))
