"""Gemma Scope 2: `resid_post/layer_L_width_W_l0_S/` with `params.safetensors` and, mostly, `config.json`; JumpReLU.

b_dec is not subtracted before encoding. Tensors are in demur's layout under lower-case names.
"""

from __future__ import annotations

import re
from pathlib import PurePath

from demur.errors import InputError
from demur.sae.files import read_tensors
from demur.sae.formats import common
from demur.sae.formats.common import Opened, Place
from demur.sae.meaning import SaeConfig, SaeModel

NAME = "gemma_scope_2"
WEIGHTS = "params.safetensors"
_NAMES = {"W_enc": "w_enc", "b_enc": "b_enc", "W_dec": "w_dec", "b_dec": "b_dec", "threshold": "threshold"}
_SITES = {"resid_post": "output", "attn_out": "self_attn.o_proj.input"}
_SITES |= {"mlp_out": "post_feedforward_layernorm.output"}


def read(place: Place, input_scale: float | None) -> Opened:
    """Open the SAE in the folder of `place`, or its file."""
    common.refuse_scale(input_scale, "Gemma Scope 2 scales nothing")
    folder, file = (place.path, place.path / WEIGHTS) if place.path.is_dir() else (place.path.parent, place.path)
    stated = folder / "config.json"
    cfg = common.read_config(stated) if stated.is_file() else {}
    found = read_tensors(file)
    own = PurePath(place.origin).parts[-3:]
    kind = next((kind for kind in ("transcoder", "clt") if any(part.startswith(kind) for part in own)), None)
    if kind or cfg.get("hf_hook_point_out") not in (None, cfg.get("hf_hook_point_in")):
        raise common.refuse_transcoder(file, {"clt": "cross-layer transcoder"}.get(kind or "", "transcoder"))
    if "affine_skip_connection" in found or ("w_dec" in found and found["w_dec"].ndim == 3):
        raise common.refuse_transcoder(file, "transcoder")
    if cfg.get("architecture", "jump_relu") != "jump_relu":
        raise InputError(f"{stated} names the architecture {cfg['architecture']!r}, expected 'jump_relu'")
    sizes = common.sizes_of(found, "b_dec", "b_enc")
    w = common.pick(found, _NAMES, sizes, file)
    hook = cfg.get("hf_hook_point_in") or _hook(place.origin)
    config = SaeConfig(
        *sizes[:2],
        k=0,
        hookpoint=common.hookpoint(hook),
        model=SaeModel(_model(str(cfg.get("model_name") or ""), place.origin), "", 0),
        architecture="jumprelu",
        subtract_b_dec=False,
        notes=() if hook else (f"{common.NO_HOOKPOINT} Keep config.json, or the folders it comes in, beside it.",),
    )
    return Opened(config, w, (stated, file) if cfg else (file,))


def _hook(origin: str) -> str:
    layer = common.last(r"layer_(\d+)", origin)
    own = PurePath(origin).parts[-3:]
    site = next((module for start, module in _SITES.items() if any(part.startswith(start) for part in own)), None)
    return f"model.layers.{layer[1]}.{site}" if layer and site else ""


def _model(named: str, origin: str) -> str:
    """The hub id: files say `gemma-v3-1b-pt` and the like, and there is no `gemma-3-270m-pt`."""
    repository = re.search(r"gemma-scope-2-(\w+-(?:pt|it))", origin)
    name = named or (f"gemma-3-{repository[1]}" if repository else "")
    name = name.replace("-v3", "-3")
    return common.hub_name(name.replace("-pt", "") if "270m" in name else name)
