"""The anatomy of an intervention: everything that one batch of prompts shows of it, one value for each prompt.

What is measured where, and how it is written: `Values`. Means and intervals are made of them in `eval.diagnosis`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from demur.eval.downstream import LinearProbe, Usual, switched
from demur.eval.interventions import BASE, Intervention
from demur.eval.observe import Batch, Bench, Seen, Steered, Text, kl_tokens, log_odds, observe, read_batch
from demur.features.openings import Openings
from demur.sae.base import Sae
from demur.spec import SteeringSpec
from demur.types import UNSTEERED, Hookpoint, parse_hookpoint

Values = dict[str, dict[str, dict[str, dict[str, float]]]]
"""By side, measure and place: for each prompt a number."""
MOVED = "moved"
"""Stands for the tokens that move at all."""
EARLIEST = -24
"""Positions before the answer that are told apart."""


@dataclass
class Instruments:
    """What looks at residuals after the edit, all fitted before."""

    usual: Mapping[str, Usual]
    """By hookpoint."""
    probes: Mapping[tuple[str, str], LinearProbe]
    """By what they tell and hookpoint."""
    lenses: Mapping[str, tuple[str, Sae]]
    """SAEs by name, each with its hookpoint."""
    counted: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By SAE, tokens on which each latent is active before and after the edit itself: filled on the way."""

    def places(self) -> list[Hookpoint]:
        """Where residuals are read."""
        names = [*self.usual, *(place for _, place in self.probes), *(place for place, _ in self.lenses.values())]
        return [parse_hookpoint(name) for name in dict.fromkeys(names)]


class Found:
    """Values on the way."""

    def __init__(self) -> None:
        self.values: Values = {}

    def put(self, side: str, measure: str, at: str, item: str, value: float) -> None:
        """One number."""
        self.values.setdefault(side, {}).setdefault(measure, {}).setdefault(at, {})[item] = value


def measure_plain(
    bench: Bench,
    views: Mapping[str, Sequence[Text]],
    interventions: Sequence[Intervention],
    instruments: Instruments,
    advance: Callable[[float], None] = lambda amount: None,
) -> Values:
    """What `interventions` do to the unsteered answers to some plain prompts, which are read under each of `views`."""
    found = Found()
    batches = {name: read_batch(bench, texts) for name, texts in views.items() if texts}
    places = instruments.places()
    for base in dict.fromkeys(one.base for one in interventions if one.base in batches):
        mine = [one for one in interventions if one.base == base]
        answers = 1 + max(len(text.ids) - text.start for text in batches[base].texts)
        every = batches[base].width if any(one.prompts for one in mine) else answers
        unsteered = observe(bench, batches[base], Steered(SteeringSpec()), every, places)
        if base == BASE:
            _residuals(found, UNSTEERED, batches[base], unsteered, None, instruments)
        for one in mine:
            batch = batches[one.view]
            last = every if one.prompts and one.view == base else answers
            seen = observe(bench, batch, Steered(one.spec, one.only), last, places if one.full else ())
            kl = kl_tokens(unsteered.log_probs[:, -last:], seen.log_probs).cpu()
            _damage(found, one, batch, kl)
            if one.full:
                _moves(found, one.key, batch, seen)
                _residuals(found, one.key, batch, seen, unsteered if one.view == base else None, instruments)
            advance(len(batch.texts))
    return found.values


def measure_harmful(
    bench: Bench,
    views: Mapping[str, Sequence[Text]],
    interventions: Sequence[Intervention],
    openings: Openings,
    advance: Callable[[float], None] = lambda amount: None,
) -> Values:
    """Change of the log-odds that the answers to some harmful prompts begin as a refusal, against the unsteered model
    under each intervention's base view; of the unsteered model the log-odds themselves."""
    found = Found()
    kept: dict[str, Tensor] = {}
    for view, texts in views.items():
        here = [one for one in interventions if one.view == view]
        specs = [Steered(SteeringSpec()), *(Steered(one.spec, one.only) for one in here)]
        scored = log_odds(bench, texts, specs, openings)
        kept[view] = scored[0]
        for one, row in zip(here, scored[1:], strict=True):
            kept[f"{one.key}@"] = row
        advance(len(texts) * len(here))
    for one in interventions:
        change = kept[f"{one.key}@"] - kept[one.base]
        for text, value in zip(views[one.view], change.tolist(), strict=True):
            found.put(one.key, "log_odds", "answer", text.id, value)
    for text, value in zip(views[BASE], kept[BASE].tolist(), strict=True):
        found.put(UNSTEERED, "log_odds", "answer", text.id, value)
    return found.values


def _damage(found: Found, one: Intervention, batch: Batch, kl: Tensor) -> None:
    """KL [batch, last], entry j of what follows column width - last + j; what follows the last token is left out."""
    for row, text in enumerate(batch.texts):
        answer = len(text.ids) - text.start
        if not answer:
            continue
        tail = kl[row, -1 - answer : -1]
        found.put(one.key, "kl", "answer", text.id, float(tail.mean()))
        found.put(one.key, "kl", "0", text.id, float(tail[0]))
        found.put(one.key, "first token", "answer", text.id, float(tail[0]) / answer)
        if not one.full:
            continue
        for place, value in enumerate(tail.tolist()):
            found.put(one.key, "kl", str(place), text.id, value)
        if not one.prompts or one.view != one.base:
            continue
        predicted = batch.of(row, kl)[:-1]
        _by_type(found, one.key, "kl", text, predicted, text.types[1:])
        _by_place(found, one.key, "kl", text, predicted, 1, text.start)


def _moves(found: Found, side: str, batch: Batch, seen: Seen) -> None:
    """How the residual moved at the lowest edited hookpoint."""
    if not seen.before:
        return
    place = min(seen.before, key=lambda name: int(name.split(".")[1]))
    old, new = seen.before[place].float(), seen.after[place].float()
    ratio = new.norm(dim=-1) / old.norm(dim=-1)
    cosine = torch.nn.functional.cosine_similarity(old, new, dim=-1)
    length = (new - old).norm(dim=-1)
    for row, text in enumerate(batch.texts):
        moved = batch.of(row, length).cpu()
        found.put(side, "move", MOVED, text.id, float(moved[moved > 0].mean()) if bool((moved > 0).any()) else 0.0)
        for measure, values in (("ratio", ratio), ("cosine", cosine), ("move", length)):
            mine = batch.of(row, values).cpu()
            _by_type(found, side, measure, text, mine, text.types)
            _by_place(found, side, measure, text, mine, 0, len(text.ids))
        _by_type(found, side, "norm", text, batch.of(row, old.norm(dim=-1)).cpu(), text.types)


def _by_type(found: Found, side: str, measure: str, text: Text, values: Tensor, types: Sequence[str]) -> None:
    for kind in dict.fromkeys(types):
        if kind == "answer" and measure == "kl":
            continue
        chosen = values[torch.tensor([other == kind for other in types])]
        found.put(side, measure, kind, text.id, float(chosen.double().mean()))


def _by_place(found: Found, side: str, measure: str, text: Text, values: Tensor, first: int, end: int) -> None:
    """By position counted from the answer's first token; `values` begin at token `first`."""
    for place in range(max(first, text.start + EARLIEST), end):
        found.put(side, measure, str(place - text.start), text.id, float(values[place - first]))


def _residuals(
    found: Found, side: str, batch: Batch, seen: Seen, unsteered: Seen | None, instruments: Instruments
) -> None:
    """What instruments say of the residuals; latents only where `unsteered` ones of the same rows are given."""
    for place, known in instruments.usual.items():
        for row, text in enumerate(batch.texts):
            x = batch.of(row, seen.at[place])[text.body :]
            found.put(side, "distance", place, text.id, float(known.distance(x).mean()))
            found.put(side, "beyond", place, text.id, float(known.beyond(x).double().mean()))
    for (what, place), probe in instruments.probes.items():
        for row, text in enumerate(batch.texts):
            found.put(side, what, place, text.id, float(probe.score(batch.of(row, seen.at[place])[text.start - 1])))
    if unsteered is None:
        return
    for name, (place, sae) in instruments.lenses.items():
        for row, text in enumerate(batch.texts):
            before, after = (batch.of(row, one.at[place])[text.body :] for one in (unsteered, seen))
            one = switched(sae, before, after)
            for measure, counts in (("on", one.on), ("off", one.off), ("active", one.active)):
                found.put(side, measure, name, text.id, float(counts.double().mean()))
            if side == "edit":
                old, new = instruments.counted.get(name, (torch.zeros_like(one.before), torch.zeros_like(one.after)))
                instruments.counted[name] = (old + one.before, new + one.after)
