"""Which contexts go together: those that begin alike, and batches in which little is padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise, takewhile
from typing import NamedTuple

_ALIKE = 16
"""Tokens below which a common beginning is not worth a pass of its own."""
_SAVED = 64
"""Tokens that a family must save."""

Context = tuple[int, ...]


class Family(NamedTuple):
    """Contexts that begin alike."""

    shared: int
    """Tokens, at least one token of each context not counted."""
    contexts: list[Context]


def families(contexts: Iterable[Context], size: int) -> list[Family]:
    """Different contexts in families of at most `size`, longest first; those that share nothing worthwhile together."""
    ordered = sorted(contexts)
    if not ordered:
        return []
    alike = [common if (common := _common(a, b)) >= _ALIKE else 0 for a, b in pairwise(ordered)]
    # a family ends where its neighbours have much less in common than those beside them
    ends = [i for i, common in enumerate(alike) if 2 * common < max(alike[max(0, i - 1) : i + 2])]
    found, loose = [], []
    for start, end in pairwise([-1, *ends, len(ordered) - 1]):
        members = ordered[start + 1 : end + 1]
        shared = min(_common(members[0], members[-1]), min(map(len, members)) - 1)
        if shared >= _ALIKE and shared * (len(members) - 1) >= _SAVED:
            found.append(Family(shared, members))
        else:
            loose += members
    found.append(Family(0, sorted(loose, key=len)))
    parts = [
        family._replace(contexts=family.contexts[start : start + size])
        for family in found
        for start in range(0, len(family.contexts), size)
    ]
    return sorted(parts, key=lambda family: -max(map(len, family.contexts)))


def _common(a: Context, b: Context) -> int:
    """Tokens that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def cheapest_batches(lengths: Sequence[int], size: int, pass_cost: int) -> list[list[int]]:
    """Indices in batches of at most `size` rows, longest first, so that tokens with padding, and passes at `pass_cost`
    tokens each, are fewest."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    costs, starts = [0], [0]
    for end in range(1, len(order) + 1):
        choices = [
            (costs[start] + pass_cost + lengths[order[start]] * (end - start), start)
            for start in range(max(0, end - size), end)
        ]
        cost, start = min(choices)
        costs.append(cost)
        starts.append(start)
    found, end = [], len(order)
    while end:
        found.append(order[starts[end] : end])
        end = starts[end]
    return found[::-1]
