"""Latents that a sparse linear probe needs to tell harmful from harmless prompts (sparse probing: Gurnee et al.,
arXiv 2305.01610; SAEBench, Karvonen et al., arXiv 2503.09532).

L1-penalised logistic regression on activations at the tokens that `Setting.where` names, each scaled by its standard
deviation. The score is the weight. It shows which few latents suffice to detect harm; of two that carry the same
information it keeps one, and it says nothing about what they cause.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from demur.features.proposers.setting import Setting
from demur.types import LatentRanking

_INVERSE_PENALTY = 1.0
"""scikit-learn's C, its default."""


def probe(setting: Setting) -> LatentRanking:
    """Weights of a sparse probe; most are exactly zero."""
    harmful, benign = setting.harmful_latents.cpu().double(), setting.benign_latents.cpu().double()
    y = np.repeat([1, 0], [len(harmful), len(benign)])
    weights = sparse_weights(torch.cat([harmful, benign]), y, _INVERSE_PENALTY)
    return setting.ranking("probe", torch.from_numpy(weights))


def sparse_weights(
    x: Tensor, y: NDArray[Any], inverse_penalty: float, sample_weight: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """[d] weights of an L1-penalised logistic regression of yes or no `y` [n] on the columns of `x` [n, d], each scaled
    by its standard deviation; most are exactly zero. `inverse_penalty`: scikit-learn's C."""
    spread = x.std(0, correction=0)
    z = torch.where(spread > 0, x / spread.clamp(min=1e-12), 0.0).double().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(l1_ratio=1.0, solver="liblinear", C=inverse_penalty, random_state=0)
        found: NDArray[np.float64] = model.fit(z, y, sample_weight=sample_weight).coef_[0]
    return found
