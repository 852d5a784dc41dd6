"""Files of directions and probes: safetensors whose header says, as JSON under the name of a format, what the tensors
are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from demur.errors import InputError, NotFoundError
from demur.record import whole_file


def write_vector(path: Path, form: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write `tensors` in float32, whole or not at all."""
    with whole_file(path) as temporary:
        save_file(
            {name: one.detach().float().contiguous().cpu() for name, one in tensors.items()},
            temporary,
            {form: json.dumps(about)},
        )


def has_form(path: Path, form: str) -> bool:
    """Whether the file says that it is of a format; false also for a file that cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return form in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_vector(path: Path, form: str, what: str, made: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file of `write_vector` says, and its tensors [float32], all of them numbers. `what` it holds and how it is
    `made` are for error messages: raises `NotFoundError` or `InputError`."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(form, "null"))
            tensors = {name: file.get_tensor(name).float() for name in set(file.keys())}
    except FileNotFoundError:
        raise NotFoundError(f"{what} file {path} does not exist; {made} writes one") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a whole safetensors file of a {what} ({error}); copy it again") from None
    if not isinstance(about, dict):
        raise InputError(f"{path} is a safetensors file, but not a {what} that {made} wrote")
    if not all(bool(one.isfinite().all()) for one in tensors.values()):
        raise wrong(path, what, "a tensor with values that are no numbers")
    return about, tensors


def wrong(path: Path, what: str, why: object) -> InputError:
    """The error for a file whose header and tensors do not make one."""
    return InputError(f"{path} is a {what} file with content that is wrong ({why}); copy it again")
