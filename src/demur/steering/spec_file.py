"""Spec files: JSON, checked against the published schema (docs/spec.schema.json, made from the nouns themselves)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demur.errors import InputError
from demur.record import from_json, read_json, to_json, write_json
from demur.spec import SPEC_FORMAT, Gate, LatentGate, NamedGate, ProbeGate, SteeringSpec, TextGate
from demur.steering.shipped import shipped_specs

_GATES: dict[str, type[Gate]] = {
    "latent": LatentGate,
    "probe": ProbeGate,
    "name": NamedGate,
    "classifier": TextGate,
}
"""The field that tells each kind of gate from the others."""


def read_spec(path: Path) -> SteeringSpec:
    """The spec in a JSON file, or the one of that name that ships with demur.

    Raises `NotFoundError`, or `InputError` naming the field that does not fit.
    """
    if not path.exists():
        path = shipped_specs().get(str(path), path)
    return parse_spec(read_json(path), str(path))


def parse_spec(value: Any, where: str = "the spec") -> SteeringSpec:
    """A spec from parsed JSON, e.g. of a request; an edit may say `latent` in place of `latents`."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is a JSON {type(value).__name__}, expected an object with `edits`")
    if value.get("format", SPEC_FORMAT) != SPEC_FORMAT:
        raise InputError(
            f"{where} has the format {value['format']!r}, but this version reads {SPEC_FORMAT!r}; update one of them"
        )
    edits = value.get("edits", [])
    if isinstance(edits, list):
        value = {**value, "edits": [_one_latent(edit) for edit in edits]}
    if isinstance(value.get("gate"), dict):
        _check_gate(value["gate"], where)
    return from_json(SteeringSpec, value, where)


def _check_gate(gate: dict[str, Any], where: str) -> None:
    """Raise about the kind of gate that is meant, not about the first kind that there is."""
    meant = [kind for field, kind in _GATES.items() if field in gate]
    if len(meant) != 1:
        raise InputError(f"the gate of {where} names {len(meant)} of {', '.join(_GATES)}; a gate has one of them")
    from_json(meant[0], gate, f"the gate of {where}")


def _one_latent(edit: Any) -> Any:
    if not isinstance(edit, dict) or "latent" not in edit or "latents" in edit:
        return edit
    return {**{key: edit[key] for key in edit if key != "latent"}, "latents": [edit["latent"]]}


def write_spec(path: Path, spec: SteeringSpec) -> None:
    """Write the spec as JSON, whole or not at all."""
    write_json(path, to_json(spec))


def schema() -> dict[str, Any]:
    """The JSON Schema of a spec file."""
    from pydantic import TypeAdapter

    made = TypeAdapter(SteeringSpec).json_schema()
    edit = made["$defs"]["Edit"]
    edit["properties"]["latent"] = {"type": "integer", "minimum": 0, "description": "in place of latents, for one"}
    edit["required"] = [name for name in edit["required"] if name != "latents"]
    edit["oneOf"] = [{"required": ["latents"]}, {"required": ["latent"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": SPEC_FORMAT, **made}
