"""Specs that ship with demur, by name, and the probes that they name by hash: `--spec balanced`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from demur.steering.probe import Probe, load_probe

EMBEDDED = Path(__file__).parent / "embedded"
"""A folder for each model, named like the embedded model, with specs, their probes and cards."""


def shipped_specs() -> dict[str, Path]:
    """By name, the file of each spec."""
    return {path.stem: path for path in sorted(EMBEDDED.glob("*/*.json"))}


@cache
def shipped_probes() -> dict[str, Probe]:
    """By hash."""
    return {probe.hash: probe for probe in map(load_probe, sorted(EMBEDDED.glob("*/*.safetensors")))}
