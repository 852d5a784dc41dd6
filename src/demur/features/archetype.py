"""Candidates from one archetypal prompt (O'Brien et al., arXiv 2411.11296, section 3.2).

The latents active on at least two tokens of a refusal of that prompt. It proposes; it shows no causal role, and it
cannot find a latent that acts on the prompt's tokens alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch

from demur.errors import InputError
from demur.lm.load import LanguageModel
from demur.lm.record import read
from demur.sae.store import LoadedSae
from demur.types import Hookpoint, LatentRanking, LatentScore, stable_hash

MIN_TOKENS = 2
"""Tokens of the refusal on which a candidate is active, at least."""


def usual_refusal(refusals: Sequence[str]) -> str:
    """The first sentence that most of `refusals` begin with, the shortest on a tie; empty without any.

    A refusal in the model's own words: latents of a wording that it never uses would be found with another.
    """
    first = Counter(re.split(r"(?<=[.!?])\s", text.strip())[0] for text in refusals)
    return min(first, key=lambda text: (-first[text], len(text), text), default="")


def candidates(
    lm: LanguageModel, loaded: LoadedSae, hookpoint: Hookpoint, prompt: list[int], refusal: list[int]
) -> LatentRanking:
    """Latents active on at least two of the `refusal` token ids after the `prompt` token ids.

    The score is the number of refusal tokens a latent is active on. Raises `InputError` when there is none.
    """
    ids = torch.tensor([[*prompt, *refusal]], device=lm.device)
    residual = read(lm.model, hookpoint, ids).residual[0, len(prompt) :]
    with torch.no_grad():
        latents = loaded.sae.encode(residual)
    counts = (latents > 0).sum(0)
    found = torch.nonzero(counts >= MIN_TOKENS).flatten().tolist()
    if not found:
        raise InputError(
            f"no latent is active on {MIN_TOKENS} tokens of the refusal at {hookpoint}; check that the SAE belongs "
            "to this hookpoint, or give a longer refusal text"
        )
    scores = [LatentScore(i, float(counts[i]), {"mean_activation": float(latents[:, i].mean())}) for i in found]
    scores.sort(key=lambda s: (-s.score, -s.detail["mean_activation"]))
    return LatentRanking("archetype", str(hookpoint), loaded.hash, stable_hash([prompt, refusal]), tuple(scores))
