"""Greedy text until a stop string: rows leave the batch as soon as they are done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from demur.lm.attach import Generation, generation
from demur.lm.batches import Row, pad, share_prefix
from demur.lm.caches import cache_argument
from demur.lm.load import LanguageModel

_CHUNK = 10
"""Tokens between looks at which rows are done."""


def write_until(lm: LanguageModel, rows: Sequence[Row], limit: int, done: Callable[[Row], bool]) -> list[list[int]]:
    """What the model writes after each of `rows`, which are one batch: at most `limit` tokens, up to an end-of-text
    token or a few tokens past the place where `done` of them holds.

    The model's own generation settings hold otherwise, repetition penalties among them. Runs under what is attached to
    the model, the same for all rows.
    """
    settings: Any = lm.model.generation_config
    given = settings.eos_token_id
    ends = set(given if isinstance(given, list) else [given])
    written: list[list[int]] = [[] for _ in rows]
    lengths = torch.tensor([len(row) for row in rows], device=lm.device)
    with torch.no_grad(), generation(lm.model, Generation(len(rows), lengths)) as about:
        everyone = torch.arange(len(rows), device=lm.device)
        about.rows, about.stands = everyone, torch.zeros_like(everyone)
        window = getattr(lm.model.config.get_text_config(), "sliding_window", None)
        # padding after a shared beginning would count as text that a window has room for
        alone = window and max(map(len, rows)) + limit > window
        shared = share_prefix(lm, rows, times=len(rows) if alone else 1)
        about.rows, about.stands = everyone, None
        cache = shared.cache
        cache.batch_select_indices(torch.zeros(len(rows), dtype=torch.long))
        # what is shared stands before the padding, in every row at the same place
        padded = pad(lm, shared.rows, side="left")
        prefix = torch.tensor([shared.prefix], dtype=torch.long, device=lm.device).expand(len(rows), -1)
        ids = torch.cat([prefix, padded.ids], dim=1)
        mask = torch.cat([torch.ones_like(prefix), padded.mask], dim=1)
        model: Any = lm.model  # transformers types `generate` as a tensor
        for start in range(0, limit, _CHUNK):
            before = ids.shape[1]
            ids = model.generate(
                input_ids=ids,
                attention_mask=mask,
                **{cache_argument(lm.model): cache},
                max_new_tokens=min(_CHUNK, limit - start),
                do_sample=False,
                pad_token_id=lm.pad_id,
            )
            going = about.rows.tolist()
            for row, tokens in zip(going, ids[:, before:].tolist(), strict=True):
                written[row] += tokens
            places = [
                place for place, row in enumerate(going) if not ends & set(written[row]) and not done(written[row])
            ]
            if not places:
                break
            kept = torch.tensor(places, device=lm.device)
            mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - before)], dim=1)[kept]
            ids, about.rows = ids[kept], about.rows[kept]
            if len(places) < len(going):
                cache.batch_select_indices(kept)
    return written
