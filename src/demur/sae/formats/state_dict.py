"""A lone file of tensors: Goodfire's SAEs, DeepSeek-R1's, Qwen Scope's, and the 2024 SAEs of Neel Nanda's trainer.

What such a file does not say is read off its name and its repository's, in the words its publisher uses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from demur.errors import InputError
from demur.sae.files import read_tensors
from demur.sae.formats import common
from demur.sae.formats.common import Opened, Place
from demur.sae.meaning import SaeConfig, SaeModel

NAME = "state_dict"
ENDINGS = (".pt", ".pth", ".bin", ".safetensors")
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")


class _Layout(NamedTuple):
    names: dict[str, str]
    architecture: str
    subtract_b_dec: bool


def _linear(encoder: str, decoder: str) -> _Layout:
    theirs = (f"{encoder}.weight.T", f"{encoder}.bias", f"{decoder}.weight.T", f"{decoder}.bias")
    return _Layout(dict(zip(_TENSORS, theirs, strict=True)), "relu", False)


_GOODFIRE = _linear("encoder_linear", "decoder_linear")
_DEEPSEEK = _linear("encoder", "decoder")
_QWEN = _Layout({"W_enc": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec.T", "b_dec": "b_dec"}, "topk", False)
_NANDA = _Layout({name: name for name in _TENSORS}, "relu", True)


def read(place: Place, input_scale: float | None) -> Opened:
    """Open the file of `place`."""
    common.refuse_scale(input_scale, "such files have none")
    file = place.path
    sibling = file.with_name(f"{file.stem}_cfg.json")
    cfg = common.read_config(sibling) if sibling.is_file() else {}
    found = read_tensors(file)
    layout = _layout(found, place, cfg != {})
    sizes = common.sizes_of(found, layout.names["b_dec"], layout.names["b_enc"])
    w = common.pick(found, layout.names, sizes, file)
    k = 0
    if layout is _QWEN:
        stated = common.last(r"L0_(\d+)", place.origin)
        if stated is None:
            raise InputError(
                f"{place.origin} does not say how many latents are active; keep the repository's name in its path, "
                "e.g. SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer12.sae.pt"
            )
        k = int(stated[1])
    layer = re.search(r"layer(\d+)\.sae", file.name) or re.search(r"[-_.]l(\d+)(?![a-zA-Z])", file.stem)
    model = re.search(r"SAE-Res-(.+)-W\d+K", place.origin) or re.match(r"(.+?)-SAE-l\d+", file.name)
    hook = str(cfg.get("act_name") or (f"layers.{layer[1]}.resid_post" if layer else ""))
    config = SaeConfig(
        *sizes[:2],
        k=k,
        hookpoint=common.hookpoint(hook),
        model=SaeModel(common.hub_name(model[1] if model else str(cfg.get("model_name") or "")), "", 0),
        architecture=layout.architecture,
        subtract_b_dec=layout.subtract_b_dec,
        notes=() if hook else (common.NO_HOOKPOINT,),
    )
    return Opened(config, w, (sibling, file) if cfg else (file,))


def _layout(found: Mapping[str, Tensor], place: Place, configured: bool) -> _Layout:
    names = set(found)
    for layout in (_GOODFIRE, _DEEPSEEK):
        if names == {their.removesuffix(".T") for their in layout.names.values()}:
            return layout
    if names == set(_TENSORS):
        if re.search(r"SAE-Res-|layer\d+\.sae", place.origin):
            return _QWEN
        if configured:
            return _NANDA
        raise InputError(
            f"{place.path} holds W_enc, b_enc, W_dec and b_dec, but nothing says whether b_dec is subtracted and which "
            "activation follows; keep the file's published name, or put the cfg.json of its library beside it"
        )
    shown = ", ".join(sorted(names)[:8]) or "no tensors"
    raise InputError(
        f"{place.path} holds {shown}, which is no SAE that demur knows from its tensors alone; give the whole folder "
        f"with its config, or a file with {', '.join(sorted(n.removesuffix('.T') for n in _GOODFIRE.names.values()))}"
    )
