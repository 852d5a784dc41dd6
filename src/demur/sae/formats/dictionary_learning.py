"""dictionary_learning: `ae.pt` (or `checkpoints/ae_STEP.pt`) and `config.json`, one class of SAE per `dict_class`.

Latents are those of the library's own loaders: an `AutoEncoder` gets decoder rows of norm 1 when it is loaded, the
others stay as they are. Training on normalised residuals rescales the biases before saving, but not in backups.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from demur.errors import InputError
from demur.sae.files import read_tensors
from demur.sae.formats import common
from demur.sae.formats.common import Opened, Place, Sizes, Weights
from demur.sae.meaning import SaeConfig, SaeModel

NAME = "dictionary_learning"


class _Class(NamedTuple):
    architecture: str
    names: dict[str, str]
    subtract_b_dec: bool = True


_LINEAR = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "b_dec"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_GATED = {"b_enc": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag", "b_dec": "decoder_bias"}
_CLASSES = {
    "AutoEncoder": _Class("relu", {**_LINEAR, "b_dec": "bias"}),
    "AutoEncoderNew": _Class("relu", {**_LINEAR, "b_dec": "decoder.bias"}, False),
    "GatedAutoEncoder": _Class("gated", {**_LINEAR, **_GATED}),
    "AutoEncoderTopK": _Class("topk", _LINEAR),
    "BatchTopKSAE": _Class("batchtopk", {**_LINEAR, "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": _Class("batchtopk", {**_PLAIN, "threshold": "threshold"}),
    "JumpReluAutoEncoder": _Class("jumprelu", {**_PLAIN, "threshold": "threshold"}, False),
}


def read(place: Place, input_scale: float | None) -> Opened:
    """Open the SAE in the folder of `place`, or one of its checkpoints."""
    common.refuse_scale(input_scale, "dictionary_learning folds it into the file")
    folder, file = (place.path.parent, place.path)
    if place.path.is_dir():
        folder = place.path
        file = next((f for f in (folder / "ae.safetensors", folder / "ae.pt") if f.is_file()), folder / "ae.pt")
    stated = next((f for f in (folder / "config.json", folder.parent / "config.json") if f.is_file()), None)
    raw = common.read_config(stated) if stated else {}
    trainer, buffer = (part if isinstance(part := raw.get(key), dict) else {} for key in ("trainer", "buffer"))
    found = read_tensors(file)
    name = str(trainer.get("dict_class") or _guess(found, file))
    if "crosscoder" in name.lower() or buffer.get("io") == "in_and_out":
        raise common.refuse_transcoder(file, name if "crosscoder" in name.lower() else "transcoder")
    if name not in _CLASSES:
        raise InputError(f"{stated} names the dict_class {name!r}; demur knows {', '.join(_CLASSES)}")
    kind = _CLASSES[name]
    sizes = _sizes(trainer, stated, found, kind)
    w = common.pick(found, kind.names, sizes, file)
    if name == "AutoEncoder":
        common.fold_norms(w)
    notes = _unscale(w, found)
    hook = _hookpoint(trainer, buffer)
    k = found.get("k", trainer.get("k", 0))
    config = SaeConfig(
        *sizes[:2],
        k=int(k) if isinstance(k, Tensor | int | float) else 0,
        hookpoint=hook,
        model=SaeModel(common.hub_name(str(trainer.get("lm_name") or "")), "", 0),
        architecture=kind.architecture,
        subtract_b_dec=kind.subtract_b_dec,
        notes=(*notes, *(() if hook else (common.NO_HOOKPOINT,)), *_unset(w, kind)),
    )
    return Opened(config, w, (stated, file) if stated else (file,))


def _guess(found: Mapping[str, Tensor], file: Path) -> str:
    """The class that these tensors, without a config, can only be of."""
    names = set(found)
    fits = [name for name, kind in _CLASSES.items() if {n.removesuffix(".T") for n in kind.names.values()} <= names]
    if "MatryoshkaBatchTopKSAE" in fits:
        return "MatryoshkaBatchTopKSAE" if "group_sizes" in names else "JumpReluAutoEncoder"
    if len(fits) == 1 and "k" not in names:
        return fits[0]
    raise InputError(
        f"{file} does not say which class of SAE it is without its config.json (it holds {', '.join(sorted(names))}); "
        "put the config.json of dictionary_learning beside it"
    )


def _sizes(trainer: dict[str, Any], stated: Path | None, found: Mapping[str, Tensor], kind: _Class) -> Sizes:
    if stated and "activation_dim" in trainer and "dict_size" in trainer:
        d_in, d_sae = (common.whole(trainer, key, stated) for key in ("activation_dim", "dict_size"))
        return Sizes(d_in, d_sae, "config.json")
    return common.sizes_of(found, kind.names["b_dec"], kind.names["b_enc"])


def _unscale(w: Weights, found: Mapping[str, Tensor]) -> list[str]:
    """Make a backup of training on x / norm_factor read x, as the library does before it saves."""
    if "step" not in found and "norm_factor" not in found:
        return []
    factor = found.get("norm_factor")
    if factor is None or not bool(factor > 0):
        return ["It is a backup made during training; if that normalised residuals, its biases are in other units."]
    for name in ("b_enc", "b_dec", "b_mag", "threshold"):
        if name in w and not (name == "threshold" and bool((w[name] < 0).all())):
            w[name] = w[name] * float(factor)
    return []


def _unset(w: Weights, kind: _Class) -> list[str]:
    if kind.architecture == "batchtopk" and bool((w["threshold"] < 0).all()):
        return ["Its threshold was never set in training, so every positive latent is active."]
    return []


def _hookpoint(trainer: dict[str, Any], buffer: dict[str, Any]) -> str:
    layer, module = trainer.get("layer"), str(trainer.get("submodule_name") or "")
    try:
        block = int(str(layer))
    except ValueError:
        return module
    if any(word in module for word in ("mlp", "att")):
        return module
    reads = "resid_pre" if buffer.get("io") == "in" else "resid_post"
    return common.hookpoint(f"layers.{block}.{reads}")
