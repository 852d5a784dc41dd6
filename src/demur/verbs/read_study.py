"""Read a study file."""

from __future__ import annotations

import tomllib
from pathlib import Path

from demur.errors import InputError, NotFoundError
from demur.record import from_json
from demur.verbs.config import StudyConfig


def read_study(path: Path) -> StudyConfig:
    """A study file (TOML; every field of `StudyConfig`). Relative paths in it are relative to the file.

    Raises `NotFoundError` or `InputError` naming the file and the field.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"study file {path} does not exist; write one as in studies/, or leave it out") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"study file {path} is not readable TOML ({error})") from None
    known = StudyConfig.__dataclass_fields__
    if unknown := [key for key in raw if key not in known]:
        raise InputError(f"{path}: {unknown[0]!r} is no field of a study; the fields are {', '.join(known)}")
    for key in ("harmful", "plain", "lookalike"):
        if isinstance(raw.get(key), str):
            raw[key] = {"path": raw[key]}
        if isinstance(raw.get(key), dict) and (other := set(raw[key]) - {"path", "column"}):
            raise InputError(
                f"{path}: {key} has {min(other)!r}, which is no field of a prompt file; use path and column"
            )
        if isinstance(raw.get(key), dict) and isinstance(raw[key].get("path"), str):
            raw[key]["path"] = _beside(path, raw[key]["path"])
    for key in ("model", "sae", "questions"):
        if isinstance(raw.get(key), str):
            raw[key] = _beside(path, raw[key])
    return from_json(StudyConfig, {"name": path.stem, **raw}, str(path))


def _beside(study: Path, given: str) -> str:
    beside = study.parent / given
    return str(beside) if beside.exists() and not Path(given).is_absolute() else given
