"""The logit lens: what a vector of the residual stream would say if it went straight to the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from demur.errors import InputError
from demur.lm.hookpoints import blocks
from demur.lm.load import LanguageModel


def logit_lens(lm: LanguageModel, vectors: Tensor) -> Tensor:
    """Logits [n, vocab] (float32) of `vectors` [n, d_model] through the model's final norm and output matrix.

    It shows what a vector does to the output by itself; the blocks in between, which may do otherwise, are left out.
    """
    model: Any = lm.model
    norm, head = _final_norm(lm), model.get_output_embeddings()
    with torch.no_grad():
        weight = head.weight
        logits: Tensor = head(norm(vectors.to(weight.device, weight.dtype))).float()
    return logits


def _final_norm(lm: LanguageModel) -> nn.Module:
    """The last norm of the decoder: the module after its blocks whose name says so."""
    decoder: nn.Module = lm.model.get_decoder()
    found = [
        module
        for name, module in decoder.named_children()
        if module is not blocks(lm.model) and ("norm" in name or name == "ln_f")
    ]
    if not found:
        raise InputError(f"no final norm was found in {type(lm.model).__name__}, which the logit lens needs")
    return found[-1]
