"""Gemma Scope (Lieberum et al., arXiv 2408.05147): `layer_L/width_W/average_l0_N/params.npz`, JumpReLU.

b_dec is not subtracted before encoding. Layer and site stand in the path only: `-res` is the output of the block.
"""

from __future__ import annotations

import re
from pathlib import PurePath

from demur.sae.files import read_tensors
from demur.sae.formats import common
from demur.sae.formats.common import Opened, Place
from demur.sae.meaning import SaeConfig, SaeModel

NAME = "gemma_scope"
WEIGHTS = "params.npz"
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def read(place: Place, input_scale: float | None) -> Opened:
    """Open `params.npz`, or the folder that holds it."""
    common.refuse_scale(input_scale, "Gemma Scope scales nothing")
    file = place.path / WEIGHTS if place.path.is_dir() else place.path
    found = {re.sub(r"^w_", "W_", name): value for name, value in read_tensors(file).items()}
    sizes = common.sizes_of(found, "b_dec", "b_enc")
    w = common.pick(found, {name: name for name in _TENSORS}, sizes, file)
    notes = []
    layer = common.last(r"layer_(\d+)", place.origin)
    model = re.search(r"gemma-scope-(\w+)-(pt|it)", place.origin)
    site = re.search(r"gemma-scope-\w+-(?:pt|it)-(res|mlp|att)", place.origin)
    if "embedding" in PurePath(place.origin).parts:
        # trained on embeddings before Gemma multiplies them by sqrt(d_in)
        common.fold_scale(w, sizes.d_in**-0.5)
        hook = "hook_embed"
    elif layer is None:
        hook = ""
        notes.append(f"{common.NO_HOOKPOINT} Keep the folders layer_L/width_W/... that Gemma Scope comes in.")
    elif site is None or site[1] == "res":
        hook = f"layers.{layer[1]}.resid_post"
        if site is None:
            notes.append("The path does not name the site; it is taken to read the output of the block (-res).")
    else:
        hook = f"blocks.{layer[1]}." + {"mlp": "hook_mlp_out", "att": "attn.hook_z"}[site[1]]
    name = f"google/gemma-2-{model[1]}{'-it' if model[2] == 'it' else ''}" if model else ""
    config = SaeConfig(
        *sizes[:2], k=0, hookpoint=hook, model=SaeModel(name, "", 0), architecture="jumprelu", subtract_b_dec=False,
        notes=tuple(notes),
    )  # fmt: skip
    return Opened(config, w, (file,))
