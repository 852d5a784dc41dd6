"""A quick capability score: multiple-choice questions, answered by the log-probability of each choice's text.

Small models know answers long before they can name a letter, so the choice's own words are scored (the mean over its
tokens), as lm-eval does for PIQA and ARC. It is a smoke detector for damage, not a benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from demur.eval.measurements import Measurements
from demur.lm.attach import prompt_lengths
from demur.lm.batches import batches, pad
from demur.lm.chat import text_ids
from demur.lm.load import LanguageModel
from demur.lm.score import log_probs_from, read_padded
from demur.sae.base import Sae
from demur.sae.store import LoadedSae
from demur.spec import SteeringSpec
from demur.steering.steer import steer
from demur.steering.vectors import Vector
from demur.types import Hookpoint, Measurement, Question


def capability(
    lm: LanguageModel,
    hookpoint: Hookpoint,
    questions: Sequence[Question],
    specs: Sequence[SteeringSpec],
    saes: Mapping[str, Sae] | Sequence[LoadedSae],
    measurements: Measurements,
    batch_size: int = 32,
    advance: Callable[[float], None] = lambda amount: None,
    directions: Sequence[Vector] = (),
) -> None:
    """Measure 1 (right) or 0 (wrong) for every question under every spec.

    All edits and gates are at `hookpoint` or above. The question is the prompt and a choice counts as written.
    """
    contexts = [text_ids(lm, f"Question: {q.question}\nAnswer:", special=True) for q in questions]
    choices = [[text_ids(lm, f" {choice}") for choice in q.choices] for q in questions]
    for chosen in batches([len(context) for context in contexts], batch_size):
        ids = [questions[i].id for i in chosen]
        waiting = [spec for spec in specs if not measurements.has("capability", spec.hash, ids)]
        if waiting:
            # choices of one token share their question's row; longer ones have a row of their own
            lengths = {_row(contexts[i], choice): len(contexts[i]) for i in chosen for choice in choices[i]}
            rows = list(lengths)
            padded = pad(lm, rows, side="left")
            last = max(len(choice) for i in chosen for choice in choices[i])
            ends = torch.tensor(list(lengths.values()), device=lm.device)
            reading = read_padded(lm, hookpoint, padded)
            for spec in waiting:
                with steer(lm, spec, saes, directions=directions), prompt_lengths(lm.model, ends):
                    log_probs = log_probs_from(lm, hookpoint, padded, reading, last)
                right = []
                for i in chosen:
                    scores = [_mean(log_probs[rows.index(_row(contexts[i], choice))], choice) for choice in choices[i]]
                    right.append(float(scores.index(max(scores)) == questions[i].answer))
                measurements.add([Measurement("capability", q, spec.hash, v) for q, v in zip(ids, right, strict=True)])
        advance(len(chosen) * len(specs))


def _row(context: list[int], choice: list[int]) -> tuple[int, ...]:
    """What stands before the last token of `choice`, which is never read."""
    return (*context, *choice[:-1])


def _mean(log_probs: Tensor, choice: list[int]) -> float:
    """Mean log-probability of the tokens of `choice`, which end the row that `log_probs` [last, vocab] is of."""
    tail = log_probs[len(log_probs) - len(choice) :]
    return sum(float(tail[place, token]) for place, token in enumerate(choice)) / len(choice)
