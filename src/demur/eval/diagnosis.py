"""From what was measured of each prompt to means, paired contrasts and their intervals: the result of `demur why`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from demur.eval.anatomy import MOVED, Values
from demur.eval.interventions import Intervention
from demur.eval.rows import ANY, FULL, refused_rate
from demur.eval.statistics import bootstrap_mean, bootstrap_paired_ratio, rate
from demur.results import WhyContrast, WhyLatent, WhyNumber, WhySide
from demur.types import UNSTEERED, Estimate, Label

_RESAMPLES = 2_000
"""Of numbers that stand in figures, of which there are hundreds."""
GROUPS = {"controls": "control", "randoms": "random"}
"""Means over the sides of a kind, at the whole dose."""
_NUMBERS = ("kl", "ratio", "cosine", "norm", "beyond", "distance", "harm", "refusal", "on", "off", "active")
_LATENTS = 8


class Series:
    """Values by side, of which some are means over several sides."""

    def __init__(self, values: Values, interventions: Sequence[Intervention], seed: int) -> None:
        self._values, self._seed = values, seed
        self._groups = {
            group: [one.key for one in interventions if one.kind == kind and one.dose == 1]
            for group, kind in GROUPS.items()
        }

    def of(self, side: str, measure: str, at: str = "answer") -> dict[str, float]:
        """By prompt; empty where it was not measured."""
        if side not in self._groups:
            return self._values.get(side, {}).get(measure, {}).get(at, {})
        parts = [self.of(one, measure, at) for one in self._groups[side]]
        items = parts[0] if parts else {}
        return {i: math.fsum(part[i] for part in parts) / len(parts) for i in items if all(i in p for p in parts)}

    def estimate(self, side: str, measure: str, at: str = "answer", resamples: int = 10_000) -> Estimate:
        """Mean over prompts."""
        values = list(self.of(side, measure, at).values())
        return Estimate(*bootstrap_mean(values, self._seed, resamples), len(values))

    def contrast(self, measure: str, first: str, second: str, other: str = "", at: str = "answer") -> WhyContrast:
        """Two sides on the prompts that both have; `other`: the measure of the second, by default the same."""
        one, two = self.of(first, measure, at), self.of(second, other or measure, at)
        items = [item for item in one if item in two]
        above, below = [one[item] for item in items], [two[item] for item in items]
        change = bootstrap_mean([a - b for a, b in zip(above, below, strict=True)], self._seed)
        share = bootstrap_paired_ratio(above, below, self._seed)
        return WhyContrast(measure, first, second, Estimate(*change, len(items)), Estimate(*share, len(items)), at)

    def places(self, side: str, measure: str) -> list[str]:
        """Where it was measured."""
        return list(self._values.get(side, {}).get(measure, {}))

    def numbers(self) -> Iterable[WhyNumber]:
        """All that stands in figures."""
        for side in [*self._values, *(group for group, keys in self._groups.items() if keys)]:
            like = self._values[self._groups[side][0] if side in self._groups else side]
            for measure in _NUMBERS:
                for at in like.get(measure, {}):
                    yield WhyNumber(side, measure, at, self.estimate(side, measure, at, _RESAMPLES))


Labels = Mapping[str, Sequence[Label]]
"""Of the answers to `harmful` and to `plain` prompts."""


def side(series: Series, one: Intervention, labels: Labels | None) -> WhySide:
    """What became of one intervention; `labels` where it was asked for answers."""
    found = WhySide(
        one.key,
        one.kind,
        one.label,
        (one.asked or one.spec).hash,
        one.dose,
        series.estimate(one.key, "kl"),
        series.estimate(one.key, "kl", "0"),
        series.estimate(one.key, "log_odds"),
        series.estimate(one.key, "move", MOVED),
    )
    return _counted(found, labels)


def as_it_is(series: Series, labels: Labels | None, prompts: int) -> WhySide:
    """The unsteered model; its log-odds are no change."""
    none = Estimate(0.0, 0.0, 0.0, prompts)
    odds = series.estimate(UNSTEERED, "log_odds")
    return _counted(WhySide(UNSTEERED, "edit", UNSTEERED, UNSTEERED, 0.0, none, none, odds, none), labels)


def _counted(one: WhySide, labels: Labels | None) -> WhySide:
    if labels is None:
        return one
    every = [label for some in labels.values() for label in some]
    scored = [label for label in every if label != "unscored"]
    return replace(
        one,
        harmful_refused=refused_rate(labels["harmful"], FULL),
        plain_refused=refused_rate(labels["plain"], ANY),
        degenerate=rate(scored.count("degenerate"), len(scored)),
        unscored=len(every) - len(scored),
    )


def contrasts(series: Series, interventions: Sequence[Intervention]) -> list[WhyContrast]:
    """What the page says of two sides."""
    keys = {one.key for one in interventions}
    reconstructed = "edit" if "preserving" in keys else "reconstructed"
    preserving = "preserving" if "preserving" in keys else "edit"
    others = [*GROUPS, "means", "prompt", "sink"]
    others += [one.key for one in interventions if one.kind in ("only", "but", "control", "random") and one.dose == 1]
    others += [one.key for one in interventions if one.kind == "edit" and one.dose != 1]
    pairs = [(other, "edit") for other in others]
    pairs += [("reconstruction", reconstructed), (preserving, reconstructed), ("reconstruction", preserving)]
    found = [series.contrast(measure, *pair) for pair in pairs for measure in ("kl", "log_odds")]
    found += [
        series.contrast(measure, "edit", UNSTEERED, at=at)
        for measure in ("beyond", "distance", "harm", "refusal")
        for at in series.places("edit", measure)
    ]
    first = series.contrast("first token", "edit", "edit", "kl")
    return [one for one in [*found, first] if one.difference.n]


def most_switched(counted: Mapping[str, tuple[Sequence[int], Sequence[int]]], tokens: int) -> list[WhyLatent]:
    """The latents of each SAE whose share of `tokens` changes most; `counted`: on how many each is active before and
    after."""
    found = []
    for name, (before, after) in counted.items():
        order = sorted(range(len(before)), key=lambda i: (-abs(after[i] - before[i]), i))
        found += [
            WhyLatent(name, i, before[i] / tokens, after[i] / tokens) for i in order[:_LATENTS] if before[i] != after[i]
        ]
    return found


def merged(some: Iterable[Values]) -> Values:
    """Values of several batches as one."""
    whole: Values = {}
    for values in some:
        for name, measures in values.items():
            for measure, places in measures.items():
                for at, items in places.items():
                    whole.setdefault(name, {}).setdefault(measure, {}).setdefault(at, {}).update(items)
    return whole
