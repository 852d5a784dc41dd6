"""Named specs that a server offers, and which of them a request gets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from demur.errors import InputError, NotFoundError
from demur.record import read_json
from demur.sae.store import LoadedSae, is_own, load_sae
from demur.spec import SPEC_FORMAT, SteeringSpec
from demur.steering.spec_file import parse_spec, read_spec
from demur.steering.vectors import Vector, load_vector
from demur.types import UNSTEERED

_EDITS, _LATENTS = 32, 256
"""Most of a spec that comes with a request."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Offered(NamedTuple):
    """What a folder of specs holds."""

    specs: dict[str, SteeringSpec]
    """By name, which is the file's without its ending."""
    saes: list[LoadedSae]
    directions: list[Vector]


def read_offered(places: Iterable[Path]) -> Offered:
    """The specs in files and folders, with the SAEs and directions that stand beside them in those folders.

    A folder's JSON files of the spec format are its specs, its subfolders in demur's own SAE format its SAEs, its
    safetensors files its directions and
    probes. Raises `NotFoundError`, and `InputError` for a folder without specs, a file that
    is no spec, or a name that occurs twice or cannot be used in a request.
    """
    found = Offered({}, [], [])
    for place in places:
        if place.is_dir():
            files = [path for path in sorted(place.glob("*.json")) if _is_spec(path)]
            if not files:
                raise InputError(
                    f"folder {place} holds no spec files (JSON with the format {SPEC_FORMAT}); put some in"
                )
            found.saes.extend(load_sae(one) for one in sorted(place.iterdir()) if one.is_dir() and is_own(one))
            found.directions.extend(load_vector(one) for one in sorted(place.glob("*.safetensors")))
        else:
            files = [place]
        for path in files:
            name = path.stem
            if name in found.specs:
                raise InputError(f"two specs have the name {name!r}; rename one of the files")
            if not _NAME.fullmatch(name) or name == UNSTEERED:
                raise InputError(
                    f"{path} would be the spec {name!r}, but a name has letters, digits, `.`, `_` and `-` only and is "
                    f"not {UNSTEERED!r}; rename the file"
                )
            found.specs[name] = read_spec(path)
    return found


def _is_spec(path: Path) -> bool:
    raw = read_json(path)
    return isinstance(raw, dict) and raw.get("format") == SPEC_FORMAT


def _inline(value: Any) -> SteeringSpec:
    """A spec that came with a request, if it is not too large to be welcome from anybody."""
    edits = value.get("edits") if isinstance(value, dict) else None
    if isinstance(edits, list):
        latents = sum(
            len(one["latents"]) for one in edits if isinstance(one, dict) and isinstance(one.get("latents"), list)
        )
        if len(edits) > _EDITS or latents > _LATENTS:
            raise InputError(
                f"the spec has {len(edits)} edits of {latents} latents; a request may bring {_EDITS} and "
                f"{_LATENTS} at most, so give larger ones to the server as files"
            )
    return parse_spec(value)


class SpecBook:
    """The specs of a server by name, the one that a request gets which asks for none, and whether it may ask."""

    def __init__(self, specs: Mapping[str, SteeringSpec], default: str = "", locked: bool = False) -> None:
        """`default`: a name; empty or `unsteered` for none. `locked`: every request gets the default.

        Raises `NotFoundError` for a default that is not there.
        """
        self.specs = dict(specs)
        self.locked = locked
        self.default = self._named(default) if default else SteeringSpec()

    def find(self, asked: Sequence[Any]) -> SteeringSpec:
        """The spec of a request that names `asked`: each nothing (None or empty), a name, `unsteered`, or a spec
        itself, as an object or as JSON text.

        Raises `NotFoundError` for an unknown name, `InputError` for a spec that is none, for two that differ, and where
        the operator has locked another.
        """
        given = [one for one in asked if one is not None and one != "" and one != {}]
        if self.locked:
            if any(not isinstance(one, str) or self.specs.get(one) != self.default for one in given):
                raise InputError("this server steers every request by a spec that its operator has chosen; name none")
            return self.default
        found = [self._one(one) for one in given]
        if len(set(found)) > 1:
            raise InputError("the request names two different specs; name one")
        return found[0] if found else self.default

    def _one(self, asked: Any) -> SteeringSpec:
        if isinstance(asked, dict):
            return _inline(asked)
        if not isinstance(asked, str):
            raise InputError(f"the spec is a JSON {type(asked).__name__}, expected a name or an object with `edits`")
        if not asked.lstrip().startswith("{"):
            return self._named(asked)
        try:
            value = json.loads(asked)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the spec is not JSON ({error}); give a name or an object with `edits`") from None
        return _inline(value)

    def _named(self, name: str) -> SteeringSpec:
        if name == UNSTEERED:
            return SteeringSpec()
        if name not in self.specs:
            raise NotFoundError(f"there is no spec {name[:80]!r}; there are {', '.join((*self.specs, UNSTEERED))}")
        return self.specs[name]

    def label(self, spec: SteeringSpec) -> str:
        """The name of the spec; `unsteered`, or `inline` for one that has none."""
        if spec.hash == UNSTEERED:
            return UNSTEERED
        return next((name for name, one in self.specs.items() if one == spec), "inline")
