"""Attribution patching of latents onto the log-odds of refusing (Yeo et al., arXiv 2505.23556).

A linear estimate, for all latents at once, of what the clamp would do on harmful prompts: the sum over tokens of
(value - activation) times the gradient of the refusal log-odds along the latent's decoder row. Gradients are integrated
(Sundararajan et al., arXiv 1703.01365) from the residual with all active latents at zero to the residual as it is. It
runs no intervention: clamps are large, and what they do is not linear.
"""

from __future__ import annotations

import torch

from demur.features.openings import Openings
from demur.features.proposers.setting import Setting
from demur.lm.packed import Text, log_probs, pack
from demur.types import LatentRanking

STEPS = 3
"""Points on the path."""
PROMPTS = 8
"""Harmful prompts, spread over those given; each costs a backward pass for every point."""
_TOGETHER = 4


def attribution(setting: Setting) -> LatentRanking:
    """Predicted change of the refusal log-odds under the clamp, mean over prompts."""
    sae, openings = setting.loaded.sae, setting.openings
    few = min(PROMPTS, len(setting.harmful))
    rows = [setting.harmful[i * len(setting.harmful) // few] for i in range(few)]
    total = torch.zeros(sae.d_sae, dtype=torch.float64, device=sae.W_dec.device)
    for at in range(0, few, _TOGETHER):
        texts = [Text(row, openings.branches) for row in rows[at : at + _TOGETHER]]
        one = pack(setting.lm, setting.hookpoint, texts)
        residual = one.reading.residual
        x = residual[0].to(sae.W_dec.dtype)
        first = one.positions[0] == 0  # no spec steers the first token, and what attends to it expects it as it is
        with torch.no_grad():
            prepared = sae.prepare(x)
            latents = sae.encode_prepared(prepared.x)
            written = latents @ sae.W_dec
            written = written if prepared.scale is None else written * prepared.scale
            written[first] = 0
        gradient = torch.zeros_like(x)
        for step in range(STEPS):
            share = (step + 0.5) / STEPS
            point = (residual - (1 - share) * written.to(residual.dtype)).detach().requires_grad_()
            odds = _total_log_odds(openings, one.of_answers(log_probs(setting.lm, one, point)))
            gradient += torch.autograd.grad(odds, point)[0][0].to(x.dtype) / STEPS
        gradient[first] = 0
        scale = 1.0 if prepared.scale is None else prepared.scale
        slope = (gradient * scale) @ sae.W_dec.T
        total += ((setting.value - latents) * slope).sum(0, dtype=torch.float64)
    return setting.ranking("attribution", total / few)


def _total_log_odds(openings: Openings, scored: list[list[torch.Tensor]]) -> torch.Tensor:
    return torch.stack([openings.log_odds(answers) for answers in scored]).sum()
