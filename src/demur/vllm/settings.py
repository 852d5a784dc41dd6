"""The plugin's settings, from environment variables: they reach every process that vLLM starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from demur.errors import InputError


class Settings(NamedTuple):
    """What the operator has set."""

    specs: tuple[Path, ...]
    """`DEMUR_SPECS`: folders (or files) of specs, divided as in `PATH`, with their SAEs and directions in the folders.
    """
    default: str
    """`DEMUR_DEFAULT_SPEC`: name of the spec of requests that name none; empty for none."""
    locked: bool
    """`DEMUR_LOCK_SPEC=1`: requests may not choose another."""
    inline: bool
    """`DEMUR_INLINE`: requests may bring a spec of their own. 1 unless set, with `DEMUR_SPECS`; 0 without."""
    latents: int
    """`DEMUR_INLINE_LATENTS`: how many latents, beside those of the named specs, inline specs may edit or read, for
    each block and SAE."""
    blocks: tuple[int, ...]
    """`DEMUR_BLOCKS`: blocks (0-based, with commas) that inline specs may edit beside those of the named specs."""
    static: bool
    """`DEMUR_STATIC=1`: no short cuts on a CPU either, so that it computes as a GPU does."""


def read_settings(environment: Mapping[str, str] | None = None) -> Settings | None:
    """The settings, or None where demur is to do nothing. Raises `InputError` for a value that is none."""
    found = os.environ if environment is None else environment
    given = found.get("DEMUR_SPECS", "").strip()
    specs = tuple(Path(one).expanduser() for one in given.split(os.pathsep) if one)
    inline = _flag(found, "DEMUR_INLINE", bool(specs))
    if not specs and not inline:
        if found.get("DEMUR_DEFAULT_SPEC", "").strip() or _flag(found, "DEMUR_LOCK_SPEC", False):
            raise InputError(
                "DEMUR_DEFAULT_SPEC or DEMUR_LOCK_SPEC is set, but DEMUR_SPECS is not, so no request would be steered; "
                "set DEMUR_SPECS to the folder of the specs"
            )
        return None
    for one in specs:
        if not one.exists():
            raise InputError(f"DEMUR_SPECS names {one}, which does not exist; give a folder of spec files")
    return Settings(
        specs,
        found.get("DEMUR_DEFAULT_SPEC", "").strip(),
        _flag(found, "DEMUR_LOCK_SPEC", False),
        inline,
        _number("DEMUR_INLINE_LATENTS", found.get("DEMUR_INLINE_LATENTS", "").strip() or "64"),
        tuple(_number("DEMUR_BLOCKS", one.strip()) for one in found.get("DEMUR_BLOCKS", "").split(",") if one.strip()),
        _flag(found, "DEMUR_STATIC", False),
    )


def _flag(found: Mapping[str, str], name: str, default: bool) -> bool:
    text = found.get(name, "").strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    if text:
        raise InputError(f"{name} is {text!r}, expected 1 or 0")
    return default


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"{name} has {text!r}, expected a number from 0 up")
    return int(text)
