"""Greedy answers in left-padded batches with a KV cache, through the model's own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from demur.lm.attach import Generation, generation, row_groups
from demur.lm.batches import Padded, Row, pad, share_prefix
from demur.lm.caches import cache_argument
from demur.lm.load import LanguageModel


class Answer(NamedTuple):
    """What the model wrote after one row."""

    ids: list[int]
    """Generated token ids, the end-of-turn token left off."""
    text: str
    stop: Literal["eos", "length"]


AS_ASKED: dict[str, Any] = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "cache_implementation": None,
}
"""What was asked for and nothing else, whatever the model's own generation settings say."""
_CHUNK = 10
"""Tokens between looks at which rows have finished. Finished rows leave the batch; refusals are short."""


def generate(lm: LanguageModel, rows: Sequence[Row], max_new_tokens: int) -> list[Answer]:
    """Greedy continuation of every row of token ids, as one batch.

    Runs under whatever is attached to the model. Greedy because a study compares interventions, not samples.
    """
    lengths = torch.tensor([len(row) for row in rows], device=lm.device)
    with generation(lm.model, Generation(len(rows), lengths)) as about:
        return _generate(lm, rows, max_new_tokens, about)


def _generate(lm: LanguageModel, rows: Sequence[Row], max_new_tokens: int, about: Generation) -> list[Answer]:
    # what all rows begin with is run once for each group of rows that are steered alike
    groups = row_groups(lm.model, len(rows))
    leaders = sorted(set(groups))
    others = [row for row in range(len(rows)) if row not in set(leaders)]
    stand = [leaders.index(group) for group in groups]
    about.rows = torch.tensor([*leaders, *others], device=lm.device)
    about.stands = torch.tensor(stand, device=lm.device)[about.rows]
    shared = share_prefix(lm, rows, times=len(leaders))
    about.rows, about.stands = torch.arange(len(rows), device=lm.device), None
    cache = shared.cache
    padded = pad(lm, shared.rows, side="left")
    if shared.prefix:
        cache.batch_select_indices(torch.tensor(stand, device=lm.device))
        prefix = torch.tensor([shared.prefix], device=lm.device).expand(len(rows), -1)
        padded = Padded(
            ids=torch.cat([prefix, padded.ids], dim=1), mask=torch.cat([torch.ones_like(prefix), padded.mask], dim=1)
        )
    model: Any = lm.model  # transformers types `generate` as a tensor
    answers: list[list[int]] = [[] for _ in rows]
    going = list(range(len(rows)))
    while going and len(answers[going[0]]) < max_new_tokens:
        new = min(_CHUNK, max_new_tokens - len(answers[going[0]]))
        with torch.no_grad():
            ids = model.generate(
                input_ids=padded.ids,
                attention_mask=padded.mask,
                **{cache_argument(lm.model): cache},
                max_new_tokens=new,
                do_sample=False,
                **AS_ASKED,
                pad_token_id=lm.pad_id,
                eos_token_id=sorted(lm.eos_ids),
            )
        written = ids[:, padded.ids.shape[1] :]
        for index, tokens in zip(going, written.tolist(), strict=True):
            answers[index] += tokens
        open_rows = [place for place, index in enumerate(going) if not lm.eos_ids & set(answers[index])]
        mask = torch.cat([padded.mask, torch.ones_like(written)], dim=1)
        if len(open_rows) < len(going):
            kept = torch.tensor(open_rows, dtype=torch.long, device=ids.device)
            cache.batch_select_indices(kept)
            ids, mask = ids[kept], mask[kept]
            assert about.rows is not None
            about.rows = about.rows[kept]
        padded = Padded(ids, mask)
        going = [going[place] for place in open_rows]
    return [_answer(lm, ids) for ids in answers]


def _answer(lm: LanguageModel, ids: list[int]) -> Answer:
    end = next((index for index, token in enumerate(ids) if token in lm.eos_ids), None)
    kept = ids[:end]
    text = str(lm.tokenizer.decode(kept, skip_special_tokens=True))
    return Answer(kept, text.strip(), "length" if end is None else "eos")
