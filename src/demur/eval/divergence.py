"""Damage on harmless prompts: KL(unsteered || steered), teacher-forced over the unsteered model's own answers.

First-token KL is what other tools report; it misses text that breaks later, so every token of the answer counts too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from demur.eval.measurements import Measurements, Name
from demur.lm.attach import prompt_lengths
from demur.lm.batches import Padded, Row, batches, pad
from demur.lm.load import LanguageModel
from demur.lm.record import Reading
from demur.lm.score import log_probs_from, read_padded
from demur.sae.base import Sae
from demur.sae.store import LoadedSae
from demur.spec import SteeringSpec
from demur.steering.steer import steer
from demur.steering.vectors import Vector
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
    directions: Sequence[Vector] = (),
    asked: Mapping[str, Sequence[Row]] | None = None,
    decided: Mapping[str, Sequence[SteeringSpec]] | None = None,
) -> None:
    """Measure KL in nats, of the first token and per token, for every item (id, prompt token ids, unsteered answer
    token ids) and spec; all edits and gates are at `hookpoint` or above.

    `asked`: by system prompt, the items' prompt token ids under a spec that brings that system prompt. `decided`: by a
    spec's hash, what a text gate of it makes of the spec for each item.
    """
    prompts: dict[str, Sequence[Row]] = {**(asked or {}), "": [prompt for _, prompt, _ in items]}
    lengths = [len(prompt) + len(answer) for _, prompt, answer in items]
    ids = [item for item, _, _ in items]
    for chosen, waiting in _unmeasured("kl", ids, lengths, specs, measurements, batch_size, advance):
        answers = [items[i][2] for i in chosen]
        last = max(len(answer) for answer in answers)

        def read(system: str, chosen: Sequence[int] = chosen) -> tuple[Padded, Reading]:
            padded = pad(lm, [[*prompts[system][i], *items[i][2][:-1]] for i in chosen], side="left")
            return padded, read_padded(lm, hookpoint, padded)

        own = read("")
        base = log_probs_from(lm, hookpoint, *own, last)
        for spec in waiting:
            system = spec.system if spec.system in prompts else ""
            other = read(system) if system else own
            ends = torch.tensor([len(prompts[system][i]) for i in chosen], device=lm.device)
            each = _each(spec, chosen, decided)
            with steer(lm, each, saes, directions=directions), prompt_lengths(lm.model, ends):
                steered = log_probs_from(lm, hookpoint, *other, last) if spec.edits or system else base
            kl = torch.nn.functional.kl_div(steered, base, reduction="none", log_target=True).sum(-1).cpu().double()
            tails = [kl[row, last - len(answer) :] for row, answer in enumerate(answers)]
            rows = [(ids[i], tail) for i, tail in zip(chosen, tails, strict=True)]
            measurements.add(
                [Measurement("kl_first", item, spec.hash, float(tail[0])) for item, tail in rows]
                + [Measurement("kl", item, spec.hash, float(tail.mean())) for item, tail in rows]
            )


def perplexity(
    lm: LanguageModel,
    hookpoint: Hookpoint,
    texts: Sequence[tuple[str, Row]],
    specs: Sequence[SteeringSpec],
    saes: Mapping[str, Sae] | Sequence[LoadedSae],
    measurements: Measurements,
    batch_size: int = 8,
    advance: Callable[[float], None] = lambda amount: None,
    directions: Sequence[Vector] = (),
    decided: Mapping[str, Sequence[SteeringSpec]] | None = None,
) -> None:
    """Measure the negative log-likelihood, in nats per token but the first, of every text (id, token ids) and spec.

    All of a text counts as prompt: a spec that steers only what the model writes changes nothing here. `decided` as for
    `divergence`.
    """
    lengths = [len(row) for _, row in texts]
    for chosen, waiting in _unmeasured("nll", [i for i, _ in texts], lengths, specs, measurements, batch_size, advance):
        padded = pad(lm, [texts[i][1][:-1] for i in chosen], side="left")
        last = padded.ids.shape[1]
        reading = read_padded(lm, hookpoint, padded)
        for spec in waiting:
            with steer(lm, _each(spec, chosen, decided), saes, directions=directions):
                log_probs = log_probs_from(lm, hookpoint, padded, reading, last)
            found = []
            for place, (item, row) in enumerate(texts[i] for i in chosen):
                wanted = torch.tensor(row[1:], device=log_probs.device)
                said = log_probs[place, last - len(wanted) :].gather(-1, wanted[:, None])
                found.append(Measurement("nll", item, spec.hash, -float(said.double().mean())))
            measurements.add(found)


def _each(
    spec: SteeringSpec, chosen: Sequence[int], decided: Mapping[str, Sequence[SteeringSpec]] | None
) -> SteeringSpec | list[SteeringSpec]:
    """The spec of each row, or the one of all."""
    found = (decided or {}).get(spec.hash)
    return spec if found is None else [found[i] for i in chosen]


def _unmeasured(
    name: Name,
    ids: Sequence[str],
    lengths: Sequence[int],
    specs: Sequence[SteeringSpec],
    measurements: Measurements,
    batch_size: int,
    advance: Callable[[float], None],
) -> Iterator[tuple[list[int], list[SteeringSpec]]]:
    """Batches of items of similar length, each with the specs under which some item of it has no measurement `name`.

    Every batch counts as done, under all specs, when the next one is asked for.
    """
    for chosen in batches(lengths, batch_size):
        mine = [ids[i] for i in chosen]
        if waiting := [spec for spec in specs if not measurements.has(name, spec.hash, mine)]:
            yield chosen, waiting
        advance(len(chosen) * len(specs))
