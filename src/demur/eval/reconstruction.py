"""What a model loses when an SAE's reconstruction stands in for its residual: CE recovered, and KL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from demur import progress
from demur.lm.batches import Padded, Row, batches, pad
from demur.lm.load import LanguageModel
from demur.lm.record import Reading, read, resume
from demur.sae.base import Sae
from demur.types import Hookpoint

_LOGITS = 1 << 25
"""Logits computed at once for each of the three variants: 128 MB in float32."""


class Recovered(NamedTuple):
    """Cross entropy per token, in nats, and the share of the ablation's damage that the SAE avoids."""

    ce: float
    ce_sae: float
    """With the residual replaced by its reconstruction."""
    ce_zero: float
    """With the residual replaced by zero."""
    ce_recovered: float
    """(ce_zero - ce_sae) / (ce_zero - ce)"""
    kl: float
    """Mean over tokens of KL(model || model with the reconstruction) over the whole vocabulary, in nats."""
    tokens: int
    """Tokens predicted: all but the first of each row."""


def ce_recovered(lm: LanguageModel, sae: Sae, hookpoint: Hookpoint, rows: Sequence[Row]) -> Recovered:
    """CE of next-token prediction over `rows` (token ids): as is, reconstructed, and zero-ablated; KL between the
    first two.

    The first token of each row keeps its own residual in all three: it is an attention sink that SAEs are not
    trained on. Everything below the hookpoint is computed once, and logits a few tokens at a time.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    with progress.track("cross entropy", len(rows), "texts") as advance:
        for batch in batches([len(row) for row in rows], 8):
            padded = pad(lm, [rows[i] for i in batch], side="right")
            predicted = padded.mask[:, 1:].bool()
            tokens += int(predicted.sum())
            start = 0
            for logits in _logits(lm, hookpoint, padded, _variants(lm, sae, hookpoint, padded)):
                place = slice(start, start + logits[0].shape[1])
                counted, wanted = predicted[:, place], padded.ids[:, 1:][:, place]
                logs = [part.float().log_softmax(-1)[counted] for part in logits]
                losses = [F.nll_loss(part, wanted[counted], reduction="none") for part in logs]
                kl = F.kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(-1)
                sums += torch.stack([part.double().sum() for part in (*losses, kl)]).cpu()
                start = place.stop
            advance(len(batch))
    ce, ce_sae, ce_zero, kl_mean = (sums / tokens).tolist()
    return Recovered(ce, ce_sae, ce_zero, (ce_zero - ce_sae) / (ce_zero - ce), kl_mean, tokens)


def _variants(lm: LanguageModel, sae: Sae, hookpoint: Hookpoint, padded: Padded) -> list[Reading]:
    """The residual as it is, reconstructed and zeroed; the first token's own in all three."""
    reading = read(lm.model, hookpoint, padded.ids, padded.mask)
    residual = reading.residual
    with torch.no_grad():  # row by row: dense latents of many tokens are large
        rebuilt = torch.cat([sae(row) for row in residual.split(1)]).to(residual.dtype)
    zeroed = torch.zeros_like(residual)
    rebuilt[:, 0] = zeroed[:, 0] = residual[:, 0]
    return [reading._replace(residual=one) for one in (residual, rebuilt, zeroed)]


def _logits(
    lm: LanguageModel, hookpoint: Hookpoint, padded: Padded, readings: Sequence[Reading]
) -> Iterator[list[Tensor]]:
    """Logits [batch, some, vocab] that follow from each of `readings`, for a few positions after the other; the last
    position of the rows, which predicts nothing, is left out."""
    top = Hookpoint(lm.n_blocks - 1)
    ends = []
    for reading in readings:
        with resume(lm.model, hookpoint, reading):
            ends.append(read(lm.model, top, padded.ids, padded.mask))
    rows, width = padded.ids.shape
    step = max(1, _LOGITS // (rows * lm.model.config.get_text_config().vocab_size))
    for positions in torch.arange(width - 1, device=lm.device).split(step):
        some = []
        for end in ends:
            with torch.no_grad(), resume(lm.model, top, end):
                some.append(
                    lm.model(
                        input_ids=padded.ids, attention_mask=padded.mask, use_cache=False, logits_to_keep=positions
                    ).logits
                )
        yield some
