"""Llama Scope (He et al., arXiv 2410.20526): `hyperparams.json` and `checkpoints/final.safetensors`.

Training scales residuals by s = sqrt(d_in) / (their mean norm), which is folded in. One threshold for all latents is
stored in the units of raw residuals, so it is compared after multiplying by s; with `sparsity_include_decoder_norm` it
is compared with latent times decoder norm, so each latent gets the threshold over its norm. Its successor
Llama-Scope-R1-Distill has `config.json`, `sae_weights.safetensors` and one threshold for each latent, as a logarithm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from demur.errors import InputError
from demur.sae.files import read_tensors
from demur.sae.formats import common
from demur.sae.formats.common import Opened, Place, Sizes
from demur.sae.meaning import SaeConfig, SaeModel

NAME = "llama_scope"
_FIRST = ("hyperparams.json", "checkpoints/final.safetensors")
_DISTILL = ("config.json", "sae_weights.safetensors")
_NAMES = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "decoder.bias"}


def read(place: Place, input_scale: float | None) -> Opened:
    """Open the SAE in the folder of `place`; `input_scale` as in `load_sae`, for Llama-Scope-R1-Distill."""
    file, weights = (place.path / name for name in (_FIRST if (place.path / _FIRST[0]).is_file() else _DISTILL))
    cfg = common.read_config(file)
    hook = str(cfg.get("hook_point_in") or "")
    if cfg.get("hook_point_out", hook) != hook:
        raise common.refuse_transcoder(file, "transcoder")
    if cfg.get("act_fn", "jumprelu") != "jumprelu":
        raise InputError(f"{file} says act_fn = {cfg['act_fn']!r}; demur reads the published form, jumprelu")
    d_in = common.whole(cfg, "d_model", file)
    d_sae = cfg.get("d_sae") or d_in * common.whole(cfg, "expansion_factor", file)
    sizes = Sizes(d_in, common.whole({"d_sae": d_sae}, "d_sae", file), file.name)
    found = read_tensors(weights)
    w = common.pick(found, _NAMES, sizes, weights)
    scale = _scale(cfg, d_in, file, input_scale)
    w["threshold"] = _threshold(cfg, found, sizes, file, weights, scale)
    if cfg.get("sparsity_include_decoder_norm"):
        w["threshold"] = w["threshold"] / w["W_dec"].norm(dim=1)
    if scale is not None:
        common.fold_scale(w, scale)
    config = SaeConfig(
        *sizes[:2],
        k=0,
        hookpoint=common.hookpoint(hook),
        model=SaeModel(common.hub_name(str(cfg.get("model_name") or "")) or "meta-llama/Llama-3.1-8B", "", 0),
        architecture="jumprelu",
        subtract_b_dec=bool(cfg.get("apply_decoder_bias_to_pre_encoder", False)),
        notes=(*(() if hook else (common.NO_HOOKPOINT,)), *(() if scale is not None else (common.UNSCALED,))),
    )
    return Opened(config, w, (file, weights))


def _scale(cfg: dict[str, Any], d_in: int, file: Path, given: float | None) -> float | None:
    how = cfg.get("norm_activation", "dataset-wise")
    if how == "inference":
        common.refuse_scale(given, f"{file} says that its scale is folded already")
        return 1.0
    if how != "dataset-wise":
        raise InputError(f"{file} says norm_activation = {how!r}; demur reads dataset-wise and inference")
    norms = cfg.get("dataset_average_activation_norm")
    if not isinstance(norms, dict):
        common.check_scale(given)
        return given
    common.refuse_scale(given, f"{file} states it")
    norm = common.number(norms, "in", file)
    if not norm > 0:
        raise InputError(f"{file} says dataset_average_activation_norm.in = {norm}, expected a positive number")
    return float(d_in**0.5 / norm)


def _threshold(
    cfg: dict[str, Any], found: dict[str, Tensor], sizes: Sizes, file: Path, weights: Path, scale: float | None
) -> Tensor:
    if "log_jumprelu_threshold" in found:
        return common.pick(found, {"threshold": "log_jumprelu_threshold"}, sizes, weights)["threshold"].exp()
    threshold = common.number(cfg, "jump_relu_threshold", file) * (1.0 if scale is None else scale)
    return found["encoder.bias"].new_full((sizes.d_sae,), threshold).float()
