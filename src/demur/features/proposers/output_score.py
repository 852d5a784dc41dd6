"""Latents that, when active, say what a refusal says (Arad et al., "SAEs Are Good for Steering", arXiv 2505.20063).

Their output score of a latent: amplify it during one forward pass on a neutral prompt and take (1 - rank / vocabulary)
times probability of the likeliest of the tokens that stand for the concept. They take those tokens from the latent's
own logit lens, for any concept; here the concept is given, so they are the ends of the model's refusal openings, each
after the beginning of its opening, and the latent is clamped instead of multiplied. Only latents whose logit lens
raises those tokens most are tried. It shows what a latent makes the model say to nobody in particular, not whether it
decides about a harmful request.
"""

from __future__ import annotations

import torch
from torch import Tensor

from demur.features.proposers.setting import Setting
from demur.features.referee import Referee
from demur.lm.chat import chat_ids
from demur.lm.lens import logit_lens
from demur.spec import Edit, SteeringSpec
from demur.types import LatentRanking, Message

TRIED = 64
"""Latents that are run, the most promising by logit lens."""
_NEUTRAL = "From my experience,"
"""The neutral text of the paper's code, here as a user turn."""
_CHUNK = 512


def output_score(setting: Setting) -> LatentRanking:
    """Output score from 0 to 1, of the latents tried; the others are left out."""
    lens = refusal_lens(setting)
    tried = lens.topk(min(TRIED, len(lens))).indices.tolist()
    sae, place = setting.loaded, str(setting.hookpoint)
    prompt = chat_ids(setting.lm, [Message("user", _NEUTRAL)])
    referee = Referee(setting.lm, setting.hookpoint, setting.openings, [prompt], saes=[sae])
    specs = [SteeringSpec((Edit(place, sae.hash, (latent,), setting.value),)) for latent in tried]
    scores = torch.zeros(len(lens), dtype=torch.float64)
    scores[tried] = referee.output_scores(specs).cpu()
    return setting.ranking("output_score", scores, {"logit_lens": lens}, keep=tried)


def refusal_lens(setting: Setting) -> Tensor:
    """[d_sae] mean logit of the last tokens of the refusal openings minus the mean over the vocabulary, by the logit
    lens of each decoder row."""
    ends = sorted({opening[-1] for opening in setting.openings.tokens})
    rows = setting.loaded.sae.W_dec.detach()
    parts = []
    for some in rows.split(_CHUNK):
        logits = logit_lens(setting.lm, some)
        parts.append(logits[:, ends].mean(1) - logits.mean(1))
    return torch.cat(parts)
