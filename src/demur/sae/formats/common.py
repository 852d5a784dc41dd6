"""What the readers share: picking tensors by their foreign names, folding scales into weights, names of places."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from demur.errors import InputError
from demur.record import read_json
from demur.sae.base import Sae
from demur.sae.meaning import SaeConfig, check
from demur.types import parse_hookpoint

Weights = dict[str, Tensor]
"""Tensors under demur's names, float32: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in], ..."""


class Place(NamedTuple):
    """One SAE on disk."""

    path: Path
    """Its folder, or its file where it has no folder of its own."""
    origin: str
    """The same as a person wrote it, or the whole local path: layer, model and k stand here in some formats."""


class Opened(NamedTuple):
    """What a reader makes of an SAE: meaning, weights, and the files they came from."""

    config: SaeConfig
    weights: Weights
    files: tuple[Path, ...]


class Sizes(NamedTuple):
    """What the shapes must be, and which file says so."""

    d_in: int
    d_sae: int
    stated_by: str


def sizes_of(found: Mapping[str, Tensor], b_dec: str, b_enc: str) -> Sizes:
    """The sizes that the tensors named `b_dec` and `b_enc` have; 0 for a missing one, which `pick` then reports."""
    lengths = [found[name].numel() if name in found else 0 for name in (b_dec, b_enc)]
    return Sizes(lengths[0], lengths[1], "the length of its biases")


_SHAPES = {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_in"), "b_dec": ("d_in",)}


def pick(found: Mapping[str, Tensor], names: Mapping[str, str], sizes: Sizes, file: Path) -> Weights:
    """`found` under demur's names, float32, checked. `names`: ours to theirs, `.T` after theirs where it is transposed.

    A single number where one for each latent is wanted (a threshold) is repeated. Raises as `demur.sae.meaning.check`.
    """
    shapes = {name: tuple(getattr(sizes, axis) for axis in _SHAPES.get(name, ("d_sae",))) for name in names}
    theirs = {name: their.removesuffix(".T") for name, their in names.items()}
    stored = {
        their: tuple(reversed(shapes[name])) if names[name].endswith(".T") else shapes[name]
        for name, their in theirs.items()
    }
    numbers = {
        their: value.expand(stored[their]) if value.ndim == 0 and len(stored[their]) == 1 else value
        for their, value in found.items()
        if their in stored
    }
    checked = check(numbers, stored, str(file), sizes.stated_by)
    return {name: checked[their].T if names[name].endswith(".T") else checked[their] for name, their in theirs.items()}


def fold_scale(w: Weights, scale: float) -> None:
    """Let weights made for `scale` x read raw x; latents stay what they were."""
    w["W_enc"] = w["W_enc"] * scale
    w["W_dec"] = w["W_dec"] / scale
    w["b_dec"] = w["b_dec"] / scale


def fold_norms(w: Weights) -> None:
    """Give every decoder row the norm 1 and its latent the unit to match; a threshold stays, in the new unit."""
    norms = w["W_dec"].norm(dim=1)
    norms = torch.where(norms > 0, norms, 1)
    w["W_dec"] = w["W_dec"] / norms.unsqueeze(1)
    if "r_mag" in w:  # the gate has no unit
        w["r_mag"], w["b_mag"] = w["r_mag"] + norms.log(), w["b_mag"] * norms
    else:
        w["W_enc"], w["b_enc"] = w["W_enc"] * norms, w["b_enc"] * norms


def fold_b_dec(w: Weights, sign: int = -1) -> None:
    """Make an encoder for x - b_dec read x (`sign` -1), or the reverse (+1); latents stay what they were."""
    shift_encoder(w, sign * (w["b_dec"] @ w["W_enc"]))


def shift_encoder(w: Weights, shift: Tensor) -> None:
    """Add `shift` [d_sae] to x W_enc."""
    w["b_enc"] = w["b_enc"] + shift
    if "r_mag" in w:
        w["b_mag"] = w["b_mag"] + shift * w["r_mag"].exp()


def check_scale(scale: float | None) -> None:
    """Raise `InputError` unless `scale`, where given, is a positive number."""
    if scale is not None and not 0 < scale < float("inf"):
        raise InputError(f"input scale is {scale}, expected a positive number: sqrt(d_in) / mean norm of the residuals")


def refuse_scale(scale: float | None, why: str) -> None:
    """Raise `InputError` where a scale was given that this file has no use for."""
    if scale is not None:
        raise InputError(f"an input scale was given, but {why}; leave the scale out")


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises `NotFoundError` or `InputError`."""
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise InputError(f"{file} holds a {type(raw).__name__}, expected a JSON object")
    return raw


def whole(config: Mapping[str, Any], key: str, file: Path) -> int:
    """The positive whole number `key` of `config`. Raises `InputError`."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 1:
        raise InputError(f"{file} says {key} = {value!r}, expected a positive whole number")
    return int(value)


def number(config: Mapping[str, Any], key: str, file: Path) -> float:
    """The number `key` of `config`. Raises `InputError`."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{file} says {key} = {value!r}, expected a number")
    return float(value)


def refuse_transcoder(file: Path, kind: str) -> InputError:
    """The error for `kind`, which reads one place of the model and writes another."""
    return InputError(
        f"{file} is of a {kind}, which does not reconstruct what it reads; demur opens autoencoders only, choose an SAE"
    )


def last(pattern: str, origin: str) -> re.Match[str] | None:
    """The last place in `origin` that `pattern` matches: an SAE's own folder says more than those above it."""
    return max(re.finditer(pattern, origin), key=lambda match: match.start(), default=None)


def hookpoint(text: str) -> str:
    """`layers.12.resid_post` for every notation of that place, any other `text` as it is."""
    try:
        return str(parse_hookpoint(text))
    except InputError:
        return text


UNSCALED = (
    "Training scaled residuals to a mean norm of sqrt(d_in) by a factor that the files leave out; it is used unscaled, "
    "which is wrong unless the factor is about 1: give it as the input scale."
)
NO_HOOKPOINT = "The file does not say where in the model this SAE reads."
_OWNERS = (
    (r"gemma-", "google/"),
    (r"pythia-", "EleutherAI/"),
    (r"(?:Meta-)?Llama-", "meta-llama/"),
    (r"Qwen", "Qwen/"),
    (r"DeepSeek-", "deepseek-ai/"),
    (r"Mistral-", "mistralai/"),
)


def hub_name(model: str) -> str:
    """The hub id of a model that is named by TransformerLens or without its owner; others as they are."""
    if re.fullmatch(r"gpt2(-small)?", model):
        return "openai-community/gpt2"
    if re.fullmatch(r"gpt2-(medium|large|xl)", model):
        return f"openai-community/{model}"
    return next((owner + model for start, owner in _OWNERS if re.match(start, model)), model)


def weights_of(sae: Sae) -> Weights:
    """The parameters of `sae`, on the CPU."""
    return {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in sae.state_dict().items()}
