"""Damage on harmless prompts: KL(unsteered || steered), teacher-forced over the unsteered model's own answers.

First-token KL is what other tools report; it misses text that breaks later, so every token of the answer counts too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from demur.eval.measurements import Measurements
from demur.lm.attach import prompt_lengths
from demur.lm.batches import Padded, Row, batches, pad
from demur.lm.load import LanguageModel
from demur.lm.record import Reading
from demur.lm.score import log_probs_from, read_padded
from demur.sae.base import Sae
from demur.sae.store import LoadedSae
from demur.spec import SteeringSpec
from demur.steering.direction import Direction
from demur.steering.steer import steer
from demur.types import Hookpoint, Measurement


def divergence(
    lm: LanguageModel,
    hookpoint: Hookpoint,
    items: Sequence[tuple[str, Row, Row]],
    specs: Sequence[SteeringSpec],
    saes: Mapping[str, Sae] | Sequence[LoadedSae],
    measurements: Measurements,
    batch_size: int = 8,
    advance: Callable[[float], None] = lambda amount: None,
    directions: Sequence[Direction] = (),
    asked: Mapping[str, Sequence[Row]] | None = None,
) -> None:
    """Measure KL in nats, of the first token and per token, for every item (id, prompt token ids, unsteered answer
    token ids) and spec; all edits and gates are at `hookpoint` or above.

    `asked`: by system prompt, the items' prompt token ids under a spec that brings that system prompt.
    """
    for chosen in batches([len(items[i][1]) + len(items[i][2]) for i in range(len(items))], batch_size):
        ids = [items[i][0] for i in chosen]
        waiting = [spec for spec in specs if not measurements.has("kl", spec.hash, ids)]
        if waiting:
            answers = [items[i][2] for i in chosen]
            last = max(len(answer) for answer in answers)

            def read(rows: Sequence[Row], answers: Sequence[Row] = answers) -> tuple[Padded, Reading]:
                whole = [[*row, *answer[:-1]] for row, answer in zip(rows, answers, strict=True)]
                padded = pad(lm, whole, side="left")
                return padded, read_padded(lm, hookpoint, padded)

            own = read([items[i][1] for i in chosen])
            base = log_probs_from(lm, hookpoint, *own, last)
            for spec in waiting:
                other = read([asked[spec.system][i] for i in chosen]) if asked and spec.system in asked else own
                rows_asked = asked[spec.system] if asked and spec.system in asked else [item[1] for item in items]
                ends = torch.tensor([len(rows_asked[i]) for i in chosen], device=lm.device)
                with steer(lm, spec, saes, directions=directions), prompt_lengths(lm.model, ends):
                    moved = spec.edits or other is not own
                    steered = log_probs_from(lm, hookpoint, *other, last) if moved else base
                kl = torch.nn.functional.kl_div(steered, base, reduction="none", log_target=True).sum(-1).cpu().double()
                tails = [kl[row, last - len(answer) :] for row, answer in enumerate(answers)]
                rows = list(zip(ids, tails, strict=True))
                measurements.add(
                    [Measurement("kl_first", item, spec.hash, float(tail[0])) for item, tail in rows]
                    + [Measurement("kl", item, spec.hash, float(tail.mean())) for item, tail in rows]
                )
        advance(len(chosen) * len(specs))


def perplexity(
    lm: LanguageModel,
    hookpoint: Hookpoint,
    texts: Sequence[tuple[str, Row]],
    specs: Sequence[SteeringSpec],
    saes: Mapping[str, Sae] | Sequence[LoadedSae],
    measurements: Measurements,
    batch_size: int = 8,
    advance: Callable[[float], None] = lambda amount: None,
    directions: Sequence[Direction] = (),
) -> None:
    """Measure the negative log-likelihood, in nats per token but the first, of every text (id, token ids) and spec.

    All of a text counts as prompt: a spec that steers only what the model writes changes nothing here.
    """
    for chosen in batches([len(row) for _, row in texts], batch_size):
        ids = [texts[i][0] for i in chosen]
        waiting = [spec for spec in specs if not measurements.has("nll", spec.hash, ids)]
        if waiting:
            rows = [list(texts[i][1]) for i in chosen]
            padded = pad(lm, [row[:-1] for row in rows], side="left")
            last = padded.ids.shape[1]
            reading = read_padded(lm, hookpoint, padded)
            for spec in waiting:
                with steer(lm, spec, saes, directions=directions):
                    log_probs = log_probs_from(lm, hookpoint, padded, reading, last)
                values = []
                for place, row in enumerate(rows):
                    wanted = torch.tensor(row[1:], device=log_probs.device)
                    said = log_probs[place, last - len(wanted) :].gather(-1, wanted[:, None])
                    values.append(-float(said.double().mean()))
                measurements.add([Measurement("nll", item, spec.hash, v) for item, v in zip(ids, values, strict=True)])
        advance(len(chosen) * len(specs))
