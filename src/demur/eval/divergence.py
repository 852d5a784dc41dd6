"""Damage on harmless prompts: KL(unsteered || steered), teacher-forced over the unsteered model's own answers.

First-token KL misses text that breaks later, so every token of the answer counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from demur.eval.measurements import Measurements
from demur.lm.batches import Row, batches, pad
from demur.lm.load import LanguageModel
from demur.lm.score import log_probs_from, read_padded
from demur.sae.base import Sae
from demur.spec import SteeringSpec
from demur.steering.steer import steer
from demur.types import Hookpoint, Measurement


def divergence(
    lm: LanguageModel,
    hookpoint: Hookpoint,
    items: Sequence[tuple[str, Row, Row]],
    specs: Sequence[SteeringSpec],
    saes: dict[str, Sae],
    measurements: Measurements,
    batch_size: int = 8,
    advance: Callable[[float], None] = lambda amount: None,
) -> None:
    """Measure KL in nats per token for every item (id, prompt token ids, unsteered answer token ids) and spec."""
    for chosen in batches([len(items[i][1]) + len(items[i][2]) for i in range(len(items))], batch_size):
        ids = [items[i][0] for i in chosen]
        waiting = [spec for spec in specs if not measurements.has("kl", spec.hash, ids)]
        if waiting:
            answers = [items[i][2] for i in chosen]
            padded = pad(lm, [[*items[i][1], *items[i][2][:-1]] for i in chosen], side="left")
            last = max(len(answer) for answer in answers)
            reading = read_padded(lm, hookpoint, padded)
            base = log_probs_from(lm, hookpoint, padded, reading, last)
            for spec in waiting:
                with steer(lm.model, spec, saes):
                    steered = log_probs_from(lm, hookpoint, padded, reading, last) if spec.edits else base
                kl = torch.nn.functional.kl_div(steered, base, reduction="none", log_target=True).sum(-1)
                values = [
                    float(kl[row, last - len(answer) :].cpu().double().mean()) for row, answer in enumerate(answers)
                ]
                measurements.add([Measurement("kl", item, spec.hash, v) for item, v in zip(ids, values, strict=True)])
        advance(len(chosen) * len(specs))
