"""Log-probabilities of given text, as one forward pass from the hookpoint up.

Rows are padded on the left, so that what is scored ends in the same column of every row; position ids are given
explicitly, which absolute-position models need.
"""

from __future__ import annotations

import torch
from torch import Tensor

from demur.lm.batches import Padded
from demur.lm.load import LanguageModel
from demur.lm.record import Reading, read, resume
from demur.types import Hookpoint


def read_padded(lm: LanguageModel, hookpoint: Hookpoint, rows: Padded) -> Reading:
    """The unsteered residual of left-padded `rows` at `hookpoint`, computed once for many interventions there."""
    return read(lm.model, hookpoint, rows.ids, rows.mask, _positions(rows))


def log_probs_from(lm: LanguageModel, hookpoint: Hookpoint, rows: Padded, reading: Reading, last: int) -> Tensor:
    """Log-probabilities [batch, last, vocab] (float32) that predict the `last` tokens after each row's end.

    Entry j predicts the token at place `width - last + 1 + j`: the final entry predicts what follows the row. Runs
    under whatever is attached at or above the hookpoint.
    """
    with torch.no_grad(), resume(lm.model, hookpoint, reading):
        logits = lm.model(
            input_ids=rows.ids,
            attention_mask=rows.mask,
            position_ids=_positions(rows),
            use_cache=False,
            logits_to_keep=last,
        ).logits
    return torch.log_softmax(logits[:, -last:].float(), dim=-1)


def _positions(rows: Padded) -> Tensor:
    return (rows.mask.cumsum(-1) - 1).clamp(min=0)
