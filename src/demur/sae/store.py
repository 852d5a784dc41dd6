"""demur's own SAE folder: `cfg.json`, `sae.safetensors`, and a `README.md` card where one was written.

Weights are safetensors, never pickle. The hash of an SAE covers its weights and what they mean, and labels every
output made with it.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from demur.errors import InputError, MismatchError
from demur.record import file_sha256, from_json, read_json, to_json, whole_file, write_json
from demur.sae.base import Reference, Sae
from demur.sae.files import read_tensors
from demur.sae.meaning import FORMAT, build
from demur.sae.meaning import LoadedSae as LoadedSae
from demur.sae.meaning import SaeConfig as SaeConfig
from demur.sae.meaning import SaeModel as SaeModel
from demur.types import stable_hash

_REFERENCE = "reference."
_LATER = {"normalize": "none", "subtract_b_dec": True}
"""Fields that cfg.json gained later, with what they meant before."""
EMBEDDED = Path(__file__).parent / "embedded"
"""Folder of the SAEs that ship with demur, by name."""


def save_sae(folder: Path, sae: Sae, config: SaeConfig, dtype: torch.dtype = torch.float32) -> None:
    """Write `sae` into `folder`, each file whole or absent. Its reference statistics go with it, where it has them."""
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in sae.state_dict().items()}
    if sae.reference is not None:
        tensors |= _named(sae.reference)
    with whole_file(folder / "sae.safetensors") as temporary:
        save_file(tensors, temporary)
    write_json(folder / "cfg.json", config)


def write_reference(folder: Path, reference: Reference) -> None:
    """Store `reference` in the SAE of `folder`; its weights keep their bits, its hash changes.

    Raises as `own_folder`.
    """
    path = own_folder(folder) / "sae.safetensors"
    tensors = {**load_file(path), **_named(reference)}
    with whole_file(path) as temporary:
        save_file(tensors, temporary)


def _named(reference: Reference) -> dict[str, torch.Tensor]:
    return {
        _REFERENCE + name: value.detach().to("cpu", torch.float32).contiguous()
        for name, value in reference._asdict().items()
    }


def load_sae(path: str | Path, input_scale: float | None = None) -> LoadedSae:
    """Load an SAE in float32, on the CPU.

    `path`: the name of an embedded SAE; a folder or file of any format in `demur.sae.formats`; or a hub reference
    `owner/repo`, `owner/repo/sub/path` or `owner/repo@revision/sub/path`, of which only that SAE's files are fetched.
    `input_scale`: the factor that residuals were multiplied by in training, for files that leave it out (SAELens's
    `expected_average_only_in`); it is folded into the weights.

    Raises `NotFoundError` where there is none, `InputError` for files that are damaged or of no known format,
    `MismatchError` when the tensors disagree with their config.
    """
    embedded = EMBEDDED / str(path)
    local = embedded if embedded.is_dir() and not Path(path).is_dir() else Path(path).expanduser()
    if not is_own(local):
        from demur.sae.formats.detect import locate, open_sae

        found = locate(str(path), local, tuple(sorted(p.name for p in EMBEDDED.glob("*") if p.is_dir())))
        local = found.place.path
        if not is_own(local):
            return open_sae(found, str(path), input_scale)
    if input_scale is not None:
        raise InputError(f"an input scale was given, but {path} is an SAE of demur, which needs none; leave it out")
    return _load_own(local, str(path))


def is_own(folder: Path) -> bool:
    """Whether `folder` holds an SAE in demur's own format."""
    cfg = folder / "cfg.json"
    raw = read_json(cfg) if cfg.is_file() else None
    return isinstance(raw, dict) and raw.get("format") == FORMAT


def own_folder(folder: Path) -> Path:
    """`folder`. Raises `InputError` unless it holds an SAE in demur's own format, which has room for statistics."""
    if not is_own(folder):
        raise InputError(
            f"{folder} is not a folder of demur's own format, which alone can hold reference statistics; "
            "make one with `demur sae convert SAE OUT --to demur`"
        )
    return folder


def _load_own(folder: Path, name: str) -> LoadedSae:
    config = from_json(SaeConfig, read_json(folder / "cfg.json"), str(folder / "cfg.json"))
    weights = folder / "sae.safetensors"
    tensors = read_tensors(weights)
    sae = build(config, tensors, str(weights), "cfg.json")
    stored = {name: tensors[_REFERENCE + name] for name in Reference._fields if _REFERENCE + name in tensors}
    if len(stored) == len(Reference._fields):
        sae.reference = Reference(**stored)
    return LoadedSae(sae, config, _hash(weights, config), name)


def embedded_sae(name: str) -> LoadedSae | None:
    """The SAE that ships with demur and has the hash `name`, if one has."""
    return embedded_saes().get(name)


@cache
def embedded_saes() -> dict[str, LoadedSae]:
    """The SAEs that ship with demur, by hash."""
    found = (load_sae(folder) for folder in sorted(EMBEDDED.glob("*")) if folder.is_dir())
    return {loaded.hash: loaded for loaded in found}


def check_fits(loaded: LoadedSae, name: str, fingerprint: str, d_model: int, n_blocks: int) -> None:
    """Raise `MismatchError` unless the SAE was trained on this model (by name, or by its norm weights).

    Files from elsewhere say neither the weights nor the number of blocks: for them the width must fit, and the block
    that they read must exist.
    """
    made_for = loaded.config.model
    own = f" ({made_for.name})" if made_for.name else ""
    reads = re.fullmatch(r"layers\.(\d+)\.resid_post", loaded.config.hookpoint)
    if made_for.n_blocks == 0 and loaded.config.d_in == d_model and reads and int(reads[1]) >= n_blocks:
        raise MismatchError(
            f"the SAE {loaded.path!r}{own} reads {loaded.config.hookpoint}, but {name} has {n_blocks} blocks; "
            "choose the SAE of this model"
        )
    if loaded.config.d_in != d_model or made_for.n_blocks not in (0, n_blocks):
        blocks = f" with {made_for.n_blocks} blocks" if made_for.n_blocks else ""
        raise MismatchError(
            f"the SAE {loaded.path!r} is for a model of width {loaded.config.d_in}{blocks}{own}, but {name} has "
            f"width {d_model} and {n_blocks} blocks; choose the SAE of this model"
        )
    # a hub id names weights, a local path does not
    same_name = name == made_for.name and not Path(name).exists()
    if made_for.fingerprint and not same_name and fingerprint != made_for.fingerprint:
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
