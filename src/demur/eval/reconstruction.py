"""What a model loses when an SAE's reconstruction stands in for its residual: CE recovered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from demur import progress
from demur.lm.attach import Edit, Step, attach
from demur.lm.batches import Row, batches, pad
from demur.lm.load import LanguageModel
from demur.sae.base import Sae
from demur.types import Hookpoint


class Recovered(NamedTuple):
    """Cross entropy per token, in nats, and the share of the ablation's damage that the SAE avoids."""

    ce: float
    ce_sae: float
    """With the residual replaced by its reconstruction."""
    ce_zero: float
    """With the residual replaced by zero."""
    ce_recovered: float
    """(ce_zero - ce_sae) / (ce_zero - ce)"""
    tokens: int


def ce_recovered(lm: LanguageModel, sae: Sae, hookpoint: Hookpoint, rows: Sequence[Row]) -> Recovered:
    """CE of next-token prediction over `rows` (token ids): as is, reconstructed, and zero-ablated.

    The first token of each row keeps its own residual in all three: it is an attention sink that SAEs are not
    trained on.
    """

    def reconstruct(residual: Tensor, step: Step) -> Tensor:
        return torch.where(_first(step), residual, sae(residual).to(residual.dtype))

    def zero(residual: Tensor, step: Step) -> Tensor:
        return torch.where(_first(step), residual, torch.zeros_like(residual))

    def same(residual: Tensor, step: Step) -> Tensor:
        return residual

    sums = [0.0, 0.0, 0.0]
    tokens = 0
    edits: tuple[Edit, ...] = (same, reconstruct, zero)
    with progress.track("cross entropy", len(rows), "texts") as advance:
        for batch in batches([len(row) for row in rows], 8):
            padded = pad(lm, [rows[i] for i in batch], side="right")
            predicted = padded.mask[:, 1:].bool()
            tokens += int(predicted.sum())
            for index, edit in enumerate(edits):
                with torch.no_grad(), attach(lm.model, hookpoint, edit):
                    logits = lm.model(input_ids=padded.ids, attention_mask=padded.mask, use_cache=False).logits
                losses = F.cross_entropy(
                    logits[:, :-1].float().flatten(0, 1), padded.ids[:, 1:].flatten(), reduction="none"
                )
                sums[index] += float(losses[predicted.flatten()].cpu().double().sum())
            advance(len(batch))
    ce, ce_sae, ce_zero = (total / tokens for total in sums)
    return Recovered(ce, ce_sae, ce_zero, (ce_zero - ce_sae) / (ce_zero - ce), tokens)


def _first(step: Step) -> Tensor:
    return (step.positions == 0).unsqueeze(-1)
