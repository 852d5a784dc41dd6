"""Measurements of a run on disk, one per (name, spec, item), and the loop that fills them in.

The residual at the hookpoint is computed once per batch and shared by all specs: each spec costs one pass over the
blocks above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from demur.record import append_jsonl, read_jsonl
from demur.types import Measurement

Name = Literal["capability", "kl", "kl_first", "nll", "log_odds"]


class Measurements:
    """`measurements.jsonl`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = {(row.name, row.spec, row.item): row for row in read_jsonl(Measurement, path)}

    def add(self, rows: Sequence[Measurement]) -> None:
        """Keep `rows`, on disk first."""
        append_jsonl(self._path, rows)
        self._rows.update({(row.name, row.spec, row.item): row for row in rows})

    def has(self, name: Name, spec: str, items: Sequence[str]) -> bool:
        """Whether every item has been measured under the spec."""
        return all((name, spec, item) in self._rows for item in items)

    def values(self, name: Name, spec: str, items: Sequence[str]) -> list[float]:
        """One value per item, in order; KeyError for one that is missing."""
        return [self._rows[name, spec, item].value for item in items]
