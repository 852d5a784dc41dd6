"""Tensors out of any file that people keep SAEs in: safetensors, torch (.pt, .pth, .bin), numpy (.npz).

Nothing is ever unpickled: torch files go through `weights_only=True`, numpy files through `allow_pickle=False`.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from demur.errors import InputError, NotFoundError

PICKLES = (".pt", ".pth", ".bin")
"""Endings of torch's own files."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of `path`, by name, on the CPU, in the file's precision; numbers become tensors without a shape.

    Of a training backup {"ae": ..., "optimizer": ..., "step": ...} or a {"state_dict": ...} the inner dictionary is
    taken, and the numbers beside it. Raises `NotFoundError` for a missing file, `InputError` for a damaged one and for
    one that only unpickling would open.
    """
    read: Callable[[Path], Any] = _torch if path.suffix in PICKLES else _numpy if path.suffix == ".npz" else load_file
    try:
        value = read(path)
    except FileNotFoundError:
        raise NotFoundError(f"{path} is missing; copy the SAE again") from None
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} would run code when opened ({_first(error)}) or is damaged, so it was not; get it as safetensors, "
            "or as a plain dictionary of tensors"
        ) from error
    except (SafetensorError, zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        kind = {".npz": "numpy", ".safetensors": "safetensors"}.get(path.suffix, "torch")
        raise InputError(f"{path} is not a whole {kind} file ({_first(error)}); copy it again") from error
    for inner in ("ae", "state_dict", "model_state_dict"):
        if isinstance(value, dict) and isinstance(value.get(inner), dict):
            value = {**{name: item for name, item in value.items() if isinstance(item, int | float)}, **value[inner]}
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, expected a dictionary of tensors")
    return {str(name): _tensor(item) for name, item in value.items() if isinstance(item, Tensor | int | float)}


def _torch(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols it may not know; whether it does, it says next
        return torch.load(path, map_location="cpu", weights_only=True)


def _numpy(path: Path) -> dict[str, Tensor]:
    import numpy as np

    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _tensor(value: Tensor | int | float) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.tensor(value)


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0][:160] if lines else type(error).__name__
