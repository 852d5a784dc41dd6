"""Files of lm-evaluation-harness's `steered` model: `lm_eval --model steered --model_args steer_path=FILE,...`.

The `.pt` form, as read in EleutherAI/lm-evaluation-harness, lm_eval/models/hf_steered.py, releases 0.4.8 to 0.4.13:
`torch.load` gives a dict of module name (below the model without its head: `layers.12`) to `action`,
`steering_coefficient`, `steering_vector`, `bias` and lately `head_index`. The docstring there shows a list of entries,
but the code wants the dict. `add` adds coefficient x vector, cast and moved to the model, to the module's output at
every token, and bears no bias: run on our files, release 0.4.13 gives demur's logits to 4e-7 on nine tiny models.
`clamp` sets the projection on the vector, which is not demur's clamp.

The `.csv` form names latents of SAEs that sparsify or SAELens can load; neither loads demur's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from demur.errors import InputError, NotFoundError
from demur.lm.hookpoints import block_at
from demur.record import whole_file
from demur.steering.added import Added, added_spec
from demur.types import Hookpoint, parse_hookpoint

Entries = dict[str, dict[str, Any]]
"""What the file holds."""
ALL_BLOCKS_SINCE = "0.4.9.2"
"""First release of lm-eval that steers several blocks each by its own vector; before, all got that of the last entry,
because the functions were lambdas made in a loop."""


def steered_entries(model: PreTrainedModel, vectors: Mapping[int, Tensor]) -> Entries:
    """The file that adds `vectors` (0-based block to [d_model]) to `model`."""
    names = {id(module): name for name, module in model.base_model.named_modules()}
    return {
        names[id(block_at(model, Hookpoint(block)))]: {
            "action": "add",
            "steering_coefficient": 1.0,
            "steering_vector": vector.detach().float().cpu().clone(),
            "bias": None,
        }
        for block, vector in vectors.items()
    }


def write_steered(path: Path, entries: Entries) -> None:
    """Write a `.pt` file of tensors and plain values, whole or not at all."""
    with whole_file(path) as temporary:
        torch.save(entries, temporary)


def read_steered(path: Path) -> Added:
    """The spec that does what a `.pt` file of `add` entries says, each at its own hookpoint.

    Only tensors and plain values are read, never code. Raises `NotFoundError`, or `InputError` for another action, a
    hookpoint that is no block, or another file.
    """
    if not path.is_file():
        raise NotFoundError(f"steering file {path} does not exist; give a .pt file")
    try:
        entries = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError for code in it, RuntimeError or EOFError for a damaged file
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"{path} is not a file of tensors and plain values ({type(error).__name__}: {reason:.80}); "
            "demur never runs code from a file"
        ) from None
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path} holds a {type(entries).__name__}, expected a dict of hookpoints with an entry each")
    vectors: dict[int, Tensor] = {}
    for name, entry in entries.items():
        block = parse_hookpoint(str(name)).block
        if block in vectors:
            raise InputError(f"{path} names block {block} twice; one entry for each block is expected")
        vectors[block] = _vector(entry, f"{path}, {name}")
    return added_spec(vectors, f"lm-eval file {path.name}")


def _vector(entry: Any, where: str) -> Tensor:
    """Coefficient x vector of one entry."""
    keys = ("action", "steering_coefficient", "steering_vector")
    if not isinstance(entry, dict) or not all(key in entry for key in keys):
        raise InputError(f"{where} is no entry of lm-eval's: {', '.join(keys)} are expected in it")
    action, coefficient, vector = (entry[key] for key in keys)
    if entry.get("head_index") is not None:
        raise InputError(f"{where} steers one attention head, which no spec does; only whole residuals can be read")
    if action != "add":
        raise InputError(
            f"{where} has the action {action!r}, which in lm-eval is about the projection on the vector and not about "
            "a latent; only add can be read"
        )
    if not isinstance(coefficient, int | float) or not math.isfinite(coefficient):
        raise InputError(f"{where} has the coefficient {coefficient!r}, expected a finite number")
    if not isinstance(vector, Tensor) or vector.ndim != 1 or not bool(vector.isfinite().all()):
        given = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise InputError(f"{where} has a vector of {given}, expected one dimension of finite numbers")
    return coefficient * vector.float()
