"""Careful replacement of vLLM's own functions: only where they look as they did when this was written."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from demur.errors import MismatchError

VERSIONS = ("0.32.",)
"""Beginnings of the versions that demur was tested with."""


def check_version(version: str) -> None:
    """Raise `MismatchError` for another version of vLLM, unless `DEMUR_ANY_VLLM=1`."""
    if not version.startswith(VERSIONS) and os.environ.get("DEMUR_ANY_VLLM") != "1":
        raise MismatchError(
            f"vLLM is {version}, but demur's plugin was made for {', '.join(one + 'x' for one in VERSIONS)}; install "
            "that, or set DEMUR_ANY_VLLM=1 to try and compare its output with demur's own"
        )


def check_signature(function: Callable[..., Any], expected: tuple[str, ...], optional: bool = False) -> None:
    """Raise `MismatchError` unless the first parameters of `function` are `expected`.

    `optional`: they may have defaults; otherwise no other parameter may be without one.
    """
    parameters = list(inspect.signature(function).parameters.values())
    names = tuple(one.name for one in parameters)
    more = [one for one in parameters[len(expected) :] if one.default is one.empty and one.kind < one.VAR_POSITIONAL]
    if names[: len(expected)] != expected or (more and not optional):
        name = getattr(function, "__qualname__", str(function))
        raise MismatchError(
            f"vLLM's {name} takes ({', '.join(names)}), but demur's plugin was made for ({', '.join(expected)}); "
            "install a version of vLLM that demur knows"
        )


def wrap(owner: Any, name: str, expected: tuple[str, ...], around: Callable[..., Any]) -> None:
    """Replace `owner.name` by `around(original, *args, **kwargs)`, once. Raises as `check_signature`, and
    `MismatchError` where there is none."""
    original = getattr(owner, name, None)
    if original is None:
        raise MismatchError(
            f"vLLM's {owner.__name__} has no {name}, which demur's plugin needs; install a version of vLLM that demur "
            "knows"
        )
    if getattr(original, "demur", False):
        return
    check_signature(original, expected)

    @wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    replaced.demur = True  # type: ignore[attr-defined]
    setattr(owner, name, replaced)
