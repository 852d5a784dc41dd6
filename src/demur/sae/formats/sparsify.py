"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors` in a folder named by the hookpoint (`layers.6`, `h.3`).

encode: p = relu((x - b_dec) W_enc + b_enc), top k or the largest of each of k groups. b_dec is always subtracted
(unless `transcode`), W_dec is stored as [d_sae, d_in], and `num_latents` 0 means d_in times `expansion_factor`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from demur.errors import InputError
from demur.record import whole_file, write_json
from demur.sae.base import Sae
from demur.sae.files import read_tensors
from demur.sae.formats import common
from demur.sae.formats.common import Opened, Place, Sizes
from demur.sae.meaning import FORMAT, SaeConfig, SaeModel

NAME = "sparsify"
WEIGHTS = "sae.safetensors"
_KINDS = ("topk", "groupmax")
_NAMES = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
_PLACE = r"(?:layers|h|blocks)\.\d+(?:\..+)?|embed_tokens|wte|embed_in"


def read(place: Place, input_scale: float | None) -> Opened:
    """Open the SAE in the folder of `place`."""
    common.refuse_scale(input_scale, "sparsify scales nothing")
    file, weights = place.path / "cfg.json", place.path / WEIGHTS
    cfg = common.read_config(file)
    if "d_in" not in cfg or "k" not in cfg:
        raise InputError(
            f"{file} is not a demur SAE (format {FORMAT!r} is missing) and not one of sparsify (d_in or k is missing); "
            "copy the whole folder as its library wrote it"
        )
    if cfg.get("transcode"):
        raise common.refuse_transcoder(file, "transcoder")
    if cfg.get("skip_connection"):
        raise common.refuse_transcoder(file, "sparse coder with a linear skip connection")
    if cfg.get("signed"):
        raise InputError(f"{file} says signed = true; its latents may be negative, which demur does not know")
    architecture = str(cfg.get("activation") or "topk")
    if architecture not in _KINDS:
        raise InputError(f"{file} names the activation {architecture!r}; demur knows {' and '.join(_KINDS)}")
    d_in = common.whole(cfg, "d_in", file)
    d_sae = cfg.get("num_latents") or d_in * common.whole({"expansion_factor": 32, **cfg}, "expansion_factor", file)
    sizes = Sizes(d_in, common.whole({"num_latents": d_sae}, "num_latents", file), "cfg.json")
    w = common.pick(read_tensors(weights), _NAMES, sizes, weights)
    parts = [part for part in Path(place.origin).parts if not re.fullmatch(r"seed\d+", part)]
    named = parts[-1] if parts and re.fullmatch(_PLACE, parts[-1]) else ""
    config = SaeConfig(
        *sizes[:2],
        k=common.whole(cfg, "k", file),
        hookpoint=common.hookpoint(named),
        model=SaeModel(common.hub_name(_model(place.path)), "", 0),
        architecture=architecture,
        notes=() if named else (f"{common.NO_HOOKPOINT} Name its folder by the module, e.g. layers.12.",),
    )
    return Opened(config, w, (file, weights))


def _model(folder: Path) -> str:
    """The model that the run's `config.json` names, in one of the folders above."""
    for above in list(folder.resolve().parents)[:4]:
        try:
            run = json.loads((above / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(run, dict) and isinstance(model := run.get("model"), str):
            return model
    return ""


def write(folder: Path, sae: Sae, config: SaeConfig) -> tuple[str, ...]:
    """Write `sae` as sparsify opens it, in float32; returns what was lost. Raises `InputError` where it cannot be."""
    if sae.kind not in _KINDS:
        raise InputError(
            f"sparsify knows {' and '.join(_KINDS)} SAEs only, and no choice of k makes a {sae.kind} SAE one of them; "
            "write it for SAELens with --to saelens"
        )
    if sae.normalize != "none":
        raise InputError(
            f"this SAE normalises every token ({sae.normalize}), which sparsify cannot; write it with --to saelens"
        )
    w = common.weights_of(sae)
    if not sae.subtract_b_dec:
        common.fold_b_dec(w, +1)
    unit = bool(((w["W_dec"].norm(dim=1) - 1).abs() < 1e-4).all())
    cfg: dict[str, Any] = {"activation": sae.kind, "expansion_factor": max(1, sae.d_sae // sae.d_in)}
    cfg |= {"normalize_decoder": unit, "num_latents": sae.d_sae, "k": config.k, "multi_topk": False}
    cfg |= {"skip_connection": False, "transcode": False, "d_in": sae.d_in}
    tensors = {their: w[our].T if their.endswith(".T") else w[our] for our, their in _NAMES.items()}
    with whole_file(folder / WEIGHTS) as temporary:
        save_file({their.removesuffix(".T"): value.contiguous() for their, value in tensors.items()}, temporary)
    write_json(folder / "cfg.json", cfg)
    lost = ["sparsify has no place for reference statistics, which stay behind."] if sae.reference else []
    if not re.fullmatch(_PLACE, folder.name):
        lost.append("sparsify keeps the hookpoint in the folder's name; give OUT a name like layers.12 to keep it.")
    return tuple(lost)
