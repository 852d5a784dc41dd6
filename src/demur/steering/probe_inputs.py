"""What a probe reads at the end of prompts, for training: the same tokens that its gate will look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from demur.lm.attach import Step, attach
from demur.lm.batches import Row, batches, pad
from demur.lm.load import LanguageModel
from demur.lm.record import read, read_at
from demur.lm.turns import USER, empty_memory, owners, read_turns
from demur.sae.base import Sae
from demur.steering.gates import Probability
from demur.steering.positions import TurnReader
from demur.steering.probe import Pool, Probe
from demur.types import Hookpoint, parse_hookpoint

_BATCH = 16

At = tuple[Hookpoint, Pool]
"""Where a probe may read, and how."""


class Inputs(NamedTuple):
    """What was read of prompts."""

    at: dict[At, Tensor]
    """[rows, width] of each place; of pool `attention` [tokens, width], row after row."""
    lengths: Tensor
    """[rows] int64: tokens of each row's last user turn, where a pool needs turns; else zeros."""


def probe_inputs(
    lm: LanguageModel,
    rows: Sequence[Row],
    hookpoints: Sequence[Hookpoint],
    pools: Sequence[Pool],
    advance: Callable[[float], None] = lambda amount: None,
    sae: Sae | None = None,
) -> Inputs:
    """Of prompts `rows`, token ids that end where the answer begins, at each place, float32 on the CPU: the residual of
    the last token (`token`), the mean over the text of the last user turn (`turn`), or each token of that text
    (`attention`).

    With `sae` its latents in place of the residual. Raises `InputError` for pools of turns without a
    chat template that marks them.
    """
    width = lm.d_model if sae is None else sae.d_sae
    found = {at: torch.empty(len(rows), width) for at in product(hookpoints, pools) if at[1] != "attention"}
    each: dict[At, list[Tensor]] = {(place, "attention"): [torch.empty(0)] * len(rows) for place in hookpoints}
    lengths = torch.zeros(len(rows), dtype=torch.long)
    turns = read_turns(lm.tokenizer) if set(pools) - {"token"} else None
    for batch in batches([len(row) for row in rows], _BATCH):
        padded = pad(lm, [rows[i] for i in batch], side="left")
        residuals = [x.float() for x in read_at(lm.model, hookpoints, padded.ids, padded.mask)]
        if sae is not None:
            residuals = [sae.encode(x.to(sae.W_dec.dtype)).float() for x in residuals]
        last = None
        if turns is not None:
            ids = padded.ids.masked_fill(padded.mask == 0, -1)
            user = owners(turns, ids, empty_memory(turns, len(batch), ids.device))[0] == USER
            last = _last_run(user)
            lengths[batch] = last.sum(1).cpu()
        for place, x in zip(hookpoints, residuals, strict=True):
            if "token" in pools:
                found[place, "token"][batch] = x[:, -1].cpu()
            if last is not None and "turn" in pools:
                mean = (x * last.unsqueeze(-1)).sum(1) / last.sum(1, keepdim=True).clamp(min=1)
                found[place, "turn"][batch] = mean.cpu()
            if last is not None and "attention" in pools:
                for i, tokens, text in zip(batch, x, last, strict=True):
                    each[place, "attention"][i] = tokens[text].cpu()
        advance(len(batch))
    if "attention" in pools:
        found |= {(place, "attention"): torch.cat(each[place, "attention"]) for place in hookpoints}
    return Inputs(found, lengths)


def probabilities_written(
    lm: LanguageModel, probe: Probe, sae: Sae | None, prompts: Sequence[Row], answers: Sequence[Row]
) -> list[Tensor]:
    """What the probe says at each token of each answer, as its gate would read it: [tokens] each, on the CPU."""
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    place = parse_hookpoint(probe.hookpoint)
    turns = read_turns(lm.tokenizer) if probe.pool != "token" else None
    for batch in batches([len(a) + len(b) for a, b in zip(prompts, answers, strict=True)], _BATCH):
        padded = pad(lm, [[*prompts[i], *answers[i]] for i in batch], side="right")
        probability = Probability(probe, sae, True, lm.device)
        reader = TurnReader(turns) if turns is not None else None

        def look(
            residual: Tensor,
            step: Step,
            batch: list[int] = batch,
            probability: Probability = probability,
            reader: TurnReader | None = reader,
        ) -> Tensor:
            p = probability.read(residual, step, reader.read(step).owner if reader else None).cpu()
            for row, i in enumerate(batch):
                found[i] = p[row, len(prompts[i]) : len(prompts[i]) + len(answers[i])]
            return residual

        with torch.no_grad(), attach(lm.model, place, look):
            read(lm.model, place, padded.ids, padded.mask)
    return found


def _last_run(chosen: Tensor) -> Tensor:
    """[batch, pos] bool: the last unbroken run of true in each row of `chosen`."""
    width = chosen.shape[1]
    places = torch.arange(width, device=chosen.device).expand_as(chosen)
    end = torch.where(chosen, places, -1).amax(1, keepdim=True)
    gap = torch.where(~chosen & (places < end), places, -1).amax(1, keepdim=True)
    return chosen & (places > gap)
