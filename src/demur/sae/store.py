"""demur's own SAE folder: `cfg.json`, `sae.safetensors`, and a `README.md` card where one was written.

Weights are safetensors, never pickle. The hash of an SAE covers its weights and what they mean, and labels every
output made with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from demur.errors import InputError, MismatchError, NotFoundError
from demur.record import file_sha256, from_json, read_json, to_json, whole_file, write_json
from demur.sae.base import Normalize, Reference, Sae
from demur.sae.thresholded import KINDS
from demur.sae.topk import TopKSae
from demur.types import stable_hash

FORMAT = "demur-sae/1"
_REFERENCE = "reference."
_LATER = {"normalize": "none", "subtract_b_dec": True}
"""Fields that cfg.json gained later, with what they meant before."""
EMBEDDED = Path(__file__).parent / "embedded"
"""Folder of the SAEs that ship with demur, by name."""


@dataclass(frozen=True)
class SaeModel:
    """The language model an SAE was trained on."""

    name: str
    fingerprint: str
    """`LanguageModel.fingerprint`."""
    n_blocks: int


@dataclass(frozen=True)
class SaeConfig:
    """`cfg.json`: what the weights mean."""

    d_in: int
    d_sae: int
    k: int
    """Active latents per token: exactly, at most or on average, as the architecture has it."""
    hookpoint: str
    model: SaeModel
    architecture: str = "topk"
    """`topk`, `batchtopk`, `jumprelu`, `relu` or `gated`."""
    normalize: Normalize = "none"
    subtract_b_dec: bool = True
    format: str = FORMAT
    training: dict[str, Any] = field(default_factory=dict)
    """Data, tokens, seed, command and commit."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Held-out FVU, L0, dead share and the like, of the weights as stored."""


@dataclass(frozen=True)
class LoadedSae:
    """An SAE ready to use."""

    sae: Sae
    config: SaeConfig
    hash: str
    """16 hex digits over weights and meaning."""
    path: str


def save_sae(folder: Path, sae: Sae, config: SaeConfig, dtype: torch.dtype = torch.float32) -> None:
    """Write `sae` into `folder`, each file whole or absent. Its reference statistics go with it, where it has them."""
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in sae.state_dict().items()}
    if sae.reference is not None:
        tensors |= _named(sae.reference)
    with whole_file(folder / "sae.safetensors") as temporary:
        save_file(tensors, temporary)
    write_json(folder / "cfg.json", config)


def write_reference(folder: Path, reference: Reference) -> None:
    """Store `reference` in the SAE of `folder`; its weights keep their bits, its hash changes."""
    path = folder / "sae.safetensors"
    tensors = {**load_file(path), **_named(reference)}
    with whole_file(path) as temporary:
        save_file(tensors, temporary)


def _named(reference: Reference) -> dict[str, torch.Tensor]:
    return {
        _REFERENCE + name: value.detach().to("cpu", torch.float32).contiguous()
        for name, value in reference._asdict().items()
    }


def load_sae(path: str | Path) -> LoadedSae:
    """Load an SAE by the name of an embedded one or from a folder, in float32, on the CPU.

    Raises `NotFoundError` where there is none, `InputError` for files of another format, `MismatchError` when the
    tensors disagree with `cfg.json`.
    """
    embedded = EMBEDDED / str(path)
    folder = embedded if embedded.is_dir() and not Path(path).is_dir() else Path(path).expanduser()
    if not (folder / "cfg.json").is_file():
        names = ", ".join(sorted(p.name for p in EMBEDDED.glob("*") if p.is_dir())) or "none"
        raise NotFoundError(
            f"no SAE is at {str(path)!r}: expected a folder with cfg.json and sae.safetensors, or the name of an "
            f"embedded SAE ({names})"
        )
    raw = read_json(folder / "cfg.json")
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise InputError(
            f"{folder}/cfg.json is not a demur SAE (format {FORMAT!r} is missing); train one with `demur sae train`"
        )
    config = from_json(SaeConfig, raw, str(folder / "cfg.json"))
    weights = folder / "sae.safetensors"
    try:
        tensors = load_file(weights)
    except FileNotFoundError:
        raise NotFoundError(f"{weights} is missing; copy the SAE folder again") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{weights} is not a whole safetensors file ({error}); copy it again") from error
    sae = _empty(config, folder)
    for name, parameter in sae.named_parameters():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != tuple(parameter.shape):
            raise MismatchError(
                f"{weights}: {name} is {found or 'missing'}, but cfg.json asks for {tuple(parameter.shape)}; "
                "the two files do not belong together"
            )
    sae.load_state_dict({name: tensors[name].float() for name in sae.state_dict()})
    stored = {name: tensors[_REFERENCE + name] for name in Reference._fields if _REFERENCE + name in tensors}
    if len(stored) == len(Reference._fields):
        sae.reference = Reference(**stored)
    return LoadedSae(sae.requires_grad_(False), config, _hash(weights, config), str(path))


def _empty(config: SaeConfig, folder: Path) -> Sae:
    if config.architecture == TopKSae.kind:
        return TopKSae(config.d_in, config.d_sae, config.k, config.normalize, config.subtract_b_dec)
    if config.architecture not in KINDS:
        raise InputError(
            f"{folder}/cfg.json names the architecture {config.architecture!r}; this version knows "
            f"{', '.join((TopKSae.kind, *KINDS))}"
        )
    return KINDS[config.architecture](config.d_in, config.d_sae, config.normalize, config.subtract_b_dec)


def embedded_sae(name: str) -> LoadedSae | None:
    """The SAE that ships with demur and has the hash `name`, if one has."""
    return _embedded().get(name)


@cache
def _embedded() -> dict[str, LoadedSae]:
    found = (load_sae(folder) for folder in sorted(EMBEDDED.glob("*")) if folder.is_dir())
    return {loaded.hash: loaded for loaded in found}


def check_fits(loaded: LoadedSae, name: str, fingerprint: str, d_model: int, n_blocks: int) -> None:
    """Raise `MismatchError` unless the SAE was trained on this model (by name, or by its norm weights)."""
    made_for = loaded.config.model
    if loaded.config.d_in != d_model or made_for.n_blocks != n_blocks:
        raise MismatchError(
            f"the SAE {loaded.path!r} is for a model of width {loaded.config.d_in} with {made_for.n_blocks} blocks "
            f"({made_for.name}), but {name} has width {d_model} and {n_blocks} blocks; choose the SAE of this model"
        )
    # a hub id names weights, a local path does not
    same_name = name == made_for.name and not Path(name).exists()
    if not same_name and fingerprint != made_for.fingerprint:
        raise MismatchError(
            f"the SAE {loaded.path!r} was trained on {made_for.name}, but the model is {name}, which has other "
            "weights; choose the SAE of this model, or train one with `demur sae train`"
        )


def _hash(weights: Path, config: SaeConfig) -> str:
    known = to_json(config)
    meaning = {key: known[key] for key in ("architecture", "k", "hookpoint", "format")}
    # named only where they are not the usual, so that older SAEs keep their hash
    meaning |= {key: known[key] for key, usual in _LATER.items() if known[key] != usual}
    return stable_hash([file_sha256(weights), meaning])
