"""What steering does to later blocks: distance from the usual residuals, linear probes, latents of an SAE.

All are fitted on prompts of the select split, unsteered, and applied to others.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from demur.errors import InputError
from demur.sae.base import Sae

_TAIL = 0.99
"""Share of unsteered tokens that count as usual."""
LEAST = 5
"""Prompts of each class without which a probe says nothing."""


@dataclass(frozen=True)
class Usual:
    """The distribution of unsteered residuals at one place: a mean and a shrunk covariance."""

    mean: Tensor
    """[d_model] float64."""
    precision: Tensor
    """[d_model, d_model] inverse covariance, float64."""
    median: float
    """Of the distance of unsteered tokens that were not fitted."""
    tail: float
    """Distance that 1 % of those exceed."""

    def distance(self, x: Tensor) -> Tensor:
        """[n] Mahalanobis distance (float64) of residuals `x` [n, d_model], per that of the median unsteered token."""
        away = x.cpu().double() - self.mean
        return ((away @ self.precision) * away).sum(-1).clamp(min=0).sqrt() / self.median

    def beyond(self, x: Tensor) -> Tensor:
        """[n] bool: further away than 99 % of unsteered tokens."""
        return self.distance(x) * self.median > self.tail


def usual(fitted: Tensor, held_out: Tensor) -> Usual:
    """Fit residuals [n, d_model] (Ledoit & Wolf 2004, J. Multivar. Anal. 88:365); distances are gauged on others [m,
    d_model], as those of fitted tokens are too small. Raises `InputError` for fewer than two tokens of a kind."""
    if len(fitted) < 2 or len(held_out) < 2:
        raise InputError(
            f"{len(fitted)} and {len(held_out)} tokens were given to learn what is usual; give more prompts"
        )
    found = LedoitWolf().fit(fitted.cpu().double().numpy())
    made = Usual(torch.from_numpy(found.location_), torch.from_numpy(found.precision_), 1.0, 1.0)
    distances = made.distance(held_out)
    return Usual(made.mean, made.precision, float(distances.median()), float(distances.quantile(_TAIL)))


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of residuals, on a scale where the two classes' means are 0 and 1."""

    weight: Tensor
    """[d_model] float64."""
    bias: float
    auroc: float
    """Out of fold."""
    positives: int
    negatives: int

    def score(self, x: Tensor) -> Tensor:
        """[n] (float64) of residuals `x` [n, d_model]: 0 as the one class on average, 1 as the other."""
        return x.cpu().double() @ self.weight + self.bias


def fit_probe(positive: Tensor, negative: Tensor, seed: int = 0) -> LinearProbe | None:
    """Logistic regression of residuals [n, d_model] and [m, d_model]; None for fewer than five of a class, or where
    classes do not differ out of fold. The scale's 0 and 1 are out-of-fold means too."""
    if min(len(positive), len(negative)) < LEAST:
        return None
    x = torch.cat([positive, negative]).cpu().double().numpy()
    y = np.repeat([1, 0], [len(positive), len(negative)])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    folds = StratifiedKFold(LEAST, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores: NDArray[np.float64] = cross_val_predict(model, x, y, cv=folds, method="decision_function")
        model.fit(x, y)
    low, high = float(scores[y == 0].mean()), float(scores[y == 1].mean())
    if not high > low:
        return None
    scaler, line = model.steps[0][1], model.steps[1][1]
    weight = line.coef_[0] / scaler.scale_
    bias = float(line.intercept_[0] - scaler.mean_ @ weight)
    gap = high - low
    return LinearProbe(
        torch.from_numpy(weight / gap),
        (bias - low) / gap,
        float(roc_auc_score(y, scores)),
        len(positive),
        len(negative),
    )


class Switched(NamedTuple):
    """Latents of one SAE before and after."""

    on: Tensor
    """[n] latents of each token that are active after and were not before."""
    off: Tensor
    """[n] the reverse."""
    active: Tensor
    """[n] active before."""
    before: Tensor
    """[d_sae] tokens on which each latent is active before."""
    after: Tensor
    """The same after."""


def switched(sae: Sae, before: Tensor, after: Tensor) -> Switched:
    """Which latents switch when residuals [n, d_model] become others; each as the SAE encodes it."""
    with torch.no_grad():
        old, new = sae.encode(before) > 0, sae.encode(after) > 0
    return Switched((new & ~old).sum(-1), (old & ~new).sum(-1), old.sum(-1), old.sum(0), new.sum(0))
