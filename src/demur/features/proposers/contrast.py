"""Latents that are active on harmful prompts and not on harmless ones, three ways.

Mean difference (as for steering vectors: Rimsky et al., arXiv 2312.06681), difference of firing rates, and AUROC of the
activation as a detector (AxBench, Wu et al., arXiv 2501.17148, ranks latents so). All read the tokens that
`Setting.where` names. They show what goes along with harmful prompts, on text; a latent that detects harm need not
cause refusal, and one that refuses need not be active before the refusal begins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from demur.features.proposers.setting import Setting
from demur.types import LatentRanking


def mean_difference(setting: Setting) -> LatentRanking:
    """Mean activation on harmful minus on benign prompts, in latent units."""
    return setting.ranking("mean_difference", setting.harmful_latents.mean(0) - setting.benign_latents.mean(0))


def rate_difference(setting: Setting) -> LatentRanking:
    """Share of harmful minus share of benign prompts on which the latent is active; equals by mean difference."""
    harmful, benign = setting.harmful_latents, setting.benign_latents
    difference = (harmful > 0).double().mean(0) - (benign > 0).double().mean(0)
    tie = (harmful.mean(0) - benign.mean(0)).double()
    # a nudge below any difference of shares orders equals
    return setting.ranking("rate_difference", difference + 1e-9 * tie / tie.abs().max().clamp(min=1e-30))


def auroc(setting: Setting) -> LatentRanking:
    """Probability that the latent is more active on a harmful prompt than on a benign one, ties counted half."""
    return setting.ranking("auroc", auroc_of(setting.harmful_latents, setting.benign_latents))


def auroc_of(positive: Tensor, negative: Tensor) -> Tensor:
    """AUROC [latents] of each column, from all pairs of `positive` [n, latents] and `negative` [m, latents].

    scikit-learn's `roc_auc_score` takes one column at a time, which is slow for tens of thousands.
    """
    above = torch.zeros(positive.shape[1], dtype=torch.float64, device=positive.device)
    for row in positive:
        above += (row > negative).sum(0) + 0.5 * (row == negative).sum(0)
    return above / (len(positive) * len(negative))
