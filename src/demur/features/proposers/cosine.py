"""Latents whose decoder row points along the refusal direction (Arditi et al., arXiv 2406.11717).

The direction is the mean residual of harmful minus that of harmless prompts at the tokens that `Setting.where` names.
Cosine of each decoder row with it, as in Yeo et al. (arXiv 2505.23556, eq. 5). It shows geometry: such a latent writes
what harmful prompts have and others have not. Whether the model then refuses is not looked at.
"""

from __future__ import annotations

import torch

from demur.features.proposers.setting import Setting
from demur.steering.direction import Direction, difference_in_means
from demur.types import LatentRanking


def refusal_direction(setting: Setting) -> Direction:
    """Difference in means of harmful and benign residuals."""
    return difference_in_means(setting.harmful_residuals, setting.benign_residuals, str(setting.hookpoint))


def cosine(setting: Setting) -> LatentRanking:
    """Cosine of decoder rows with the refusal direction, from -1 to 1."""
    rows = setting.loaded.sae.W_dec.detach().float()
    vector = refusal_direction(setting).vector.to(rows.device)
    return setting.ranking("cosine", torch.nn.functional.cosine_similarity(rows, vector.unsqueeze(0)))
