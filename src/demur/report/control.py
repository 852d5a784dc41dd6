"""Steered latent against control latent by value: what part of the cost belongs to steering as such."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from demur.report.figures import MEASURES
from demur.report.words import number, points, signed, span_parts, whole
from demur.types import UNSTEERED, Rate, StudyResult


class Comparison(NamedTuple):
    """One clamp value under both latents."""

    value: str
    changes: list[tuple[str, str]]
    """Change from the unsteered model in points, (steered, control), in the order of `MEASURES`."""
    kl: tuple[str, str]
    """KL in nats per token, (steered, control)."""
    readings: list[str]
    """What each cost says about steering as such, a sentence each."""


COSTS = {
    "capability": ("Capability", "lost", -1),
    "benign_refused": ("Plain benign prompts refused", "added", 1),
    "lookalike_refused": ("Look-alikes refused", "added", 1),
}
"""Field, its name, what a cost is called, the sign that makes it a cost."""


def comparisons(result: StudyResult) -> Iterator[Comparison]:
    """One comparison for each value that both latents were clamped at; none without an unsteered row."""
    start = next((row for row in result.rows if row.spec == UNSTEERED), None)
    controls = {row.value: row for row in result.control_rows}
    for row in result.rows:
        other = controls.get(row.value)
        if start is None or other is None or row.spec == UNSTEERED:
            continue
        changes = {}
        for field in MEASURES:
            before: Rate = getattr(start, field)
            changes[field] = points(before, getattr(row, field)), points(before, getattr(other, field))
        readings = []
        for field, (what, verb, sign) in COSTS.items():
            steered, control = (sign * change for change in changes[field])
            overlap = _overlap(getattr(row, field), getattr(other, field))
            readings.append(reading(what, verb, (steered, control), overlap))
        yield Comparison(
            number(row.value),
            [(signed(steered), signed(control)) for steered, control in changes.values()],
            (span_parts(row.kl, row.kl, row.kl)[0], span_parts(other.kl, other.kl, other.kl)[0]),
            readings,
        )


def reading(what: str, verb: str, costs: tuple[float, float], overlap: bool) -> str:
    """How much of a cost, in points (steered, control), the control has too.

    `overlap`: the two 95 % intervals overlap. That is a look, not a test; the page says what it means.
    """
    if not all(map(math.isfinite, costs)):
        return f"{what}: not measured on both sides."
    steered, base = map(whole, costs)
    if steered <= 0:
        return f"{what}: no cost."
    shared = "none of them" if base <= 0 else "all of them also" if base >= steered else f"{base} of them also"
    hedge = " (intervals overlap)" if overlap else ""
    return f"{what}: {steered} points {verb}, {shared} under the control{hedge}."


def _overlap(one: Rate, other: Rate) -> bool:
    return one.low <= other.high and other.low <= one.high
