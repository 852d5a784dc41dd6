"""What a spec names by hash besides SAEs: directions that edits go along, and probes that gates read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from demur.steering.direction import Direction, load_direction
from demur.steering.probe import PROBE_FORMAT, Probe, load_probe
from demur.steering.vector_file import has_form

Vector = Direction | Probe


def load_vectors(directions: Iterable[Path], probes: Iterable[Path]) -> list[Vector]:
    """All of them. Raises as `load_direction` and `load_probe` do."""
    return [*map(load_direction, directions), *map(load_probe, probes)]


def load_vector(path: Path) -> Vector:
    """The direction or probe in a safetensors file. Raises as `load_direction` does."""
    return load_probe(path) if has_form(path, PROBE_FORMAT) else load_direction(path)
