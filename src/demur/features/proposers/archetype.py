"""Candidates from one archetypal prompt (O'Brien et al., arXiv 2411.11296, section 3.2).

The latents active on at least two tokens of a refusal of that prompt. It proposes; it shows no causal role, and it
cannot find a latent that acts on the prompt's tokens alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from demur.errors import InputError
from demur.features.proposers.setting import Setting
from demur.lm.record import read
from demur.types import LatentRanking, stable_hash

MIN_TOKENS = 2
"""Tokens of the refusal on which a candidate is active, at least."""


def archetype(setting: Setting) -> LatentRanking:
    """Latents active on at least two tokens of the refusal, by the number of tokens.

    Raises `InputError` when there is none.
    """
    prompt, refusal = setting.archetype, setting.refusal
    ids = torch.tensor([[*prompt, *refusal]], device=setting.lm.device)
    residual = read(setting.lm.model, setting.hookpoint, ids).residual[0, len(prompt) :]
    with torch.no_grad():
        latents = setting.loaded.sae.encode(residual)
    counts = (latents > 0).sum(0)
    found = torch.nonzero(counts >= MIN_TOKENS).flatten().tolist()
    if not found:
        raise InputError(
            f"no latent is active on {MIN_TOKENS} tokens of the refusal at {setting.hookpoint}; check that the SAE "
            "belongs to this hookpoint, or give a longer refusal text"
        )
    mean = latents.mean(0)
    # equals by how strongly they are active
    ranking = setting.ranking("archetype", counts + (mean / mean.max()) / 2, {"mean_activation": mean}, keep=found)
    scores = tuple(replace(one, score=float(counts[one.latent])) for one in ranking.scores)
    return replace(ranking, prompts=stable_hash([list(prompt), list(refusal)]), scores=scores)
