"""Greedy answers in left-padded batches with a KV cache, through the model's own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from demur.lm.batches import Row, pad, share_prefix
from demur.lm.load import LanguageModel


class Answer(NamedTuple):
    """What the model wrote after one row."""

    ids: list[int]
    """Generated token ids, the end-of-turn token left off."""
    text: str
    stop: Literal["eos", "length"]


def generate(lm: LanguageModel, rows: Sequence[Row], max_new_tokens: int) -> list[Answer]:
    """Greedy continuation of every row of token ids, as one batch.

    Runs under whatever is attached to the model. Greedy because a study compares interventions, not samples.
    """
    shared = share_prefix(lm, rows)
    padded = pad(lm, shared.rows, side="left")
    if shared.prefix:
        shared.cache.batch_repeat_interleave(len(rows))
        prefix = torch.tensor([shared.prefix], device=lm.device).expand(len(rows), -1)
        padded = padded._replace(
            ids=torch.cat([prefix, padded.ids], dim=1),
            mask=torch.cat([torch.ones_like(prefix), padded.mask], dim=1),
        )
    with torch.no_grad():
        model: Any = lm.model  # transformers types `generate` as a tensor
        output = model.generate(
            input_ids=padded.ids,
            attention_mask=padded.mask,
            past_key_values=shared.cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=lm.pad_id,
            eos_token_id=sorted(lm.eos_ids),
        )
    return [_answer(lm, ids) for ids in output[:, padded.ids.shape[1] :].tolist()]


def _answer(lm: LanguageModel, ids: list[int]) -> Answer:
    end = next((index for index, token in enumerate(ids) if token in lm.eos_ids), None)
    kept = ids[:end]
    text = str(lm.tokenizer.decode(kept, skip_special_tokens=True))
    return Answer(kept, text.strip(), "length" if end is None else "eos")
