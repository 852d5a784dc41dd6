"""SAELens: `cfg.json` (nested since 6.0, flat before) and `sae_weights.safetensors`; also its training checkpoints.

A checkpoint holds weights for scaled or whitened residuals, with `activation_scaler.json` and
`activation_whitening.safetensors` beside them; both are folded in here. Decoder norms are folded where SAELens ranks
by them, after the scale and before the whitening, as SAELens does when it makes an inference SAE.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from demur.errors import InputError
from demur.record import whole_file, write_json
from demur.sae.base import Normalize, Sae
from demur.sae.files import read_tensors
from demur.sae.formats import common
from demur.sae.formats.common import Opened, Place, Sizes, Weights
from demur.sae.meaning import SaeConfig, SaeModel

NAME = "saelens"
WEIGHTS = "sae_weights.safetensors"
_SCALER, _WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_NORMALIZE: dict[str, Normalize] = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}
_BATCH = ("batchtopk", "matryoshka_batchtopk")
_KINDS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
_KINDS |= {**dict.fromkeys(_BATCH, "batchtopk"), "matching_pursuit": "matching_pursuit"}
_OTHERS = {
    "abstopk": "its latents may be negative, which no steering operation of demur means",
    "temporal": "its latents depend on earlier tokens",
}


def read(place: Place, input_scale: float | None) -> Opened:
    """Open the SAE in the folder of `place`; `input_scale` as in `load_sae`."""
    file, weights = place.path / "cfg.json", place.path / WEIGHTS
    cfg = _modern(common.read_config(file))
    architecture = str(cfg.get("architecture"))
    if "transcoder" in architecture or architecture == "clt" or "d_out" in cfg:
        raise common.refuse_transcoder(file, architecture)
    if architecture not in _KINDS:
        why = _OTHERS.get(architecture, f"demur knows {', '.join(_KINDS)}")
        raise InputError(f"{file} names the architecture {architecture!r}, which cannot be used: {why}")
    sizes = Sizes(common.whole(cfg, "d_in", file), common.whole(cfg, "d_sae", file), "cfg.json")
    found = read_tensors(weights)
    w = _weights(found, architecture, sizes, weights)
    _unfinetune(w, found, cfg, weights)
    subtract = bool(cfg.get("apply_b_dec_to_input", True))
    if architecture == "matching_pursuit":
        _pursue(w, cfg, subtract, file)
    files, notes = [file, weights], _notes(cfg)
    normalize = _normalize(w, cfg, subtract, input_scale, place.path, files, notes)
    head = cfg.get("hook_head_index")
    hook = str(cfg.get("hook_name") or "")
    config = SaeConfig(
        *sizes[:2],
        k=_k(cfg, architecture, sizes, file),
        hookpoint=common.hookpoint(hook) if head is None else f"{hook}.{head}",
        model=SaeModel(common.hub_name(str(cfg.get("model_name") or "")), "", 0),
        architecture=_KINDS[architecture] if "topk_threshold" not in found else "batchtopk",
        normalize=normalize,
        subtract_b_dec=subtract,
        notes=tuple(notes),
    )
    return Opened(config, w, tuple(files))


def _modern(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` with its metadata beside the rest, in the words of 6.0."""
    if isinstance(raw.get("metadata"), dict):
        return {**raw["metadata"], **raw}
    cfg = {_RENAMED.get(key, key): value for key, value in raw.items()}
    cfg.setdefault("architecture", "standard")
    cfg.setdefault("model_from_pretrained_kwargs", {"center_writing_weights": True})  # TransformerLens's default then
    activation, k = cfg.get("activation_fn", "relu"), (cfg.get("activation_fn_kwargs") or {}).get("k")
    if activation == "topk" and k is not None:
        cfg |= {"architecture": "topk", "k": k}
    elif activation != "relu" and cfg["architecture"] == "standard":
        raise InputError(f"cfg.json names the activation function {activation!r}; demur knows relu and topk")
    if isinstance(cfg.get("normalize_activations"), bool):
        cfg["normalize_activations"] = "expected_average_only_in" if cfg["normalize_activations"] else "none"
    return cfg


def _weights(found: dict[str, Tensor], architecture: str, sizes: Sizes, file: Path) -> Weights:
    names = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if architecture == "gated":
        names |= {"b_enc": "b_gate", "b_mag": "b_mag", "r_mag": "r_mag"}
    if architecture == "matching_pursuit":
        names = {"W_dec": "W_dec", "b_dec": "b_dec"}
    if architecture == "jumprelu" or architecture in _BATCH:
        names["threshold"] = next((n for n in ("topk_threshold", "log_threshold") if n in found), "threshold")
    w = common.pick(found, names, sizes, file)
    if names.get("threshold") == "log_threshold":
        w["threshold"] = w["threshold"].exp()
    return w


def _unfinetune(w: Weights, found: dict[str, Tensor], cfg: dict[str, Any], file: Path) -> None:
    """SAEs of early 2024 may scale each latent between encoding and decoding."""
    scaling = found.get("scaling_factor", found.get("finetuning_scaling_factor"))
    if scaling is None or bool((scaling == 1).all()):
        return
    if not cfg.get("finetuning_scaling_factor"):
        raise InputError(
            f"{file} holds a scaling_factor that is not 1 while cfg.json says finetuning_scaling_factor = false, so "
            "nobody can tell whether it is meant; remove the tensor or set the flag"
        )
    w["W_dec"] = w["W_dec"] * scaling.float().unsqueeze(1)


def _pursue(w: Weights, cfg: dict[str, Any], subtract: bool, file: Path) -> None:
    if cfg.get("stop_on_duplicate_support") is False:
        raise InputError(f"{file} says stop_on_duplicate_support = false, which demur does not know")
    w["W_enc"], w["b_enc"] = w["W_dec"].T, torch.zeros(len(w["W_dec"]))
    w["residual_threshold"] = torch.tensor(
        common.number({"residual_threshold": 1e-2, **cfg}, "residual_threshold", file)
    )
    if not subtract:
        w["b_dec"] = torch.zeros_like(w["b_dec"])  # used in neither direction then


def _normalize(
    w: Weights, cfg: dict[str, Any], subtract: bool, scale: float | None, folder: Path, files: list[Path],
    notes: list[str],
) -> Normalize:  # fmt: skip
    """Fold into `w` what can be folded, and return what must be done to each token."""
    how = cfg.get("normalize_activations") or "none"
    scaler = folder / _SCALER
    stored = common.read_config(scaler) if scaler.is_file() else {}
    if how != "expected_average_only_in":
        common.refuse_scale(scale, f"cfg.json says normalize_activations = {how!r}, which needs none")
    elif scale is None and stored.get("scaling_factor") is not None:
        scale = common.number(stored, "scaling_factor", scaler)
        files.append(scaler)
    if how == "expected_average_only_in":
        if scale is None:
            notes.append(common.UNSCALED)
        else:
            common.check_scale(scale)
            common.fold_scale(w, scale)
            if "residual_threshold" in w:
                w["residual_threshold"] = w["residual_threshold"] / scale
            if cfg.get("rescale_acts_by_decoder_norm") and "threshold" in w:
                w["threshold"] = w["threshold"] / scale
    if cfg.get("rescale_acts_by_decoder_norm"):
        common.fold_norms(w)
    if how == "covariance_whitening":
        whitening = folder / _WHITENING
        _unwhiten(w, read_tensors(whitening), subtract, whitening)
        files.append(whitening)
    elif how != "expected_average_only_in":
        if how not in _NORMALIZE:
            known = ", ".join((*_NORMALIZE, "expected_average_only_in", "covariance_whitening"))
            raise InputError(f"cfg.json says normalize_activations = {how!r}; demur knows {known}")
        return _NORMALIZE[how]
    return "none"


def _unwhiten(w: Weights, found: dict[str, Tensor], subtract: bool, file: Path) -> None:
    """Fold z = (x - mean) matrix before encoding and its inverse after decoding, in float64."""
    if "residual_threshold" in w:
        raise InputError(f"{file} whitens residuals for a matching pursuit, which cannot be folded into its weights")
    d_in = len(w["b_dec"])
    for name, shape in (("mean", (d_in,)), ("matrix", (d_in, d_in)), ("inverse_matrix", (d_in, d_in))):
        if name not in found or tuple(found[name].shape) != shape:
            raise InputError(f"{file}: {name} is missing or not of shape {shape}; copy the checkpoint again")
    mean, matrix, inverse = (found[name].double() for name in ("mean", "matrix", "inverse_matrix"))
    w["W_enc"] = (matrix @ w["W_enc"].double()).float()
    if not subtract:
        common.shift_encoder(w, -(mean @ w["W_enc"].double()).float())
    w["W_dec"] = (w["W_dec"].double() @ inverse).float()
    w["b_dec"] = (w["b_dec"].double() @ inverse + mean).float()


def _k(cfg: dict[str, Any], architecture: str, sizes: Sizes, file: Path) -> int:
    if architecture == "topk":
        return common.whole(cfg, "k", file)
    if architecture == "matching_pursuit":
        return sizes.d_in if cfg.get("max_iterations") is None else common.whole(cfg, "max_iterations", file)
    if architecture == "jumprelu" and cfg.get("training_architecture") in _BATCH:  # made of one at the end of training
        cfg = cfg.get("training_architecture_details") or {}
    elif architecture not in _BATCH:
        return 0
    k = cfg.get("k")
    return round(k) if isinstance(k, int | float) else 0


def _notes(cfg: dict[str, Any]) -> list[str]:
    notes = []
    if not cfg.get("hook_name"):
        notes.append(common.NO_HOOKPOINT)
    if (cfg.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        notes.append(
            "It may have been trained on TransformerLens's processed weights; if its model has LayerNorm (GPT-2, "
            "Pythia), those residuals have their mean over the width removed, and the model's own have not."
        )
    positions = cfg.get("seqpos_slice")
    if positions and any(part is not None for part in positions):
        notes.append(f"It was trained on the token positions {positions} only.")
    return notes


_WRITTEN = {"topk": "topk", "relu": "standard", "jumprelu": "jumprelu", "batchtopk": "jumprelu", "gated": "gated"}
_WRITTEN |= {"matching_pursuit": "matching_pursuit"}


def write(folder: Path, sae: Sae, config: SaeConfig) -> tuple[str, ...]:
    """Write `sae` as SAELens 6 opens it, in float32; returns what was lost. Raises `InputError` where it cannot be."""
    w = common.weights_of(sae)
    if sae.kind not in _WRITTEN:
        raise InputError(f"SAELens knows no {sae.kind} SAE, so this one cannot be written for it; use --to demur")
    architecture = _WRITTEN[sae.kind]
    if architecture == "standard" and bool((w.pop("threshold") > 0).any()):
        raise InputError("this ReLU SAE has thresholds, which SAELens's standard SAE has not; name it jumprelu")
    cfg: dict[str, Any] = {"architecture": architecture, "d_in": sae.d_in, "d_sae": sae.d_sae}
    cfg |= {"dtype": "float32", "device": "cpu", "apply_b_dec_to_input": sae.subtract_b_dec}
    cfg |= {"normalize_activations": {ours: theirs for theirs, ours in _NORMALIZE.items()}[sae.normalize]}
    cfg |= {"reshape_activations": "none"}
    if sae.kind == "topk":
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    if sae.kind == "gated":
        w["b_gate"] = w.pop("b_enc")
    if sae.kind == "matching_pursuit":
        if not torch.equal(w["W_enc"], w["W_dec"].T) or (not sae.subtract_b_dec and bool(w["b_dec"].any())):
            raise InputError(
                "SAELens takes the encoder of a matching-pursuit SAE from its decoder, and uses b_dec on both sides or "
                "on none; this one is otherwise (an input scale is folded in), so use --to demur"
            )
        cfg |= {"residual_threshold": float(w.pop("residual_threshold")), "max_iterations": config.k}
        cfg |= {"stop_on_duplicate_support": True}
        del w["W_enc"], w["b_enc"]
    block = re.fullmatch(r"layers\.(\d+)\.resid_post", config.hookpoint)
    hook = f"blocks.{block[1]}.hook_resid_post" if block else config.hookpoint
    cfg["metadata"] = {
        "sae_lens_version": "6.0.0",  # whose layout this is; without it SAELens reads a flat one
        "model_name": config.model.name,
        "hook_name": hook,
        "hook_head_index": None,
        **({"hf_hook_name": f"model.layers.{block[1]}"} if block else {}),
    }
    with whole_file(folder / WEIGHTS) as temporary:
        save_file(w, temporary)
    write_json(folder / "cfg.json", cfg)
    return ("SAELens has no place for reference statistics, which stay behind.",) if sae.reference else ()
