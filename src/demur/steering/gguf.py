"""GGUF control vectors, which llama.cpp adds to the residual with `--control-vector FILE`.

Which block does tensor `direction.k` belong to? Read in ggml-org/llama.cpp: `common_control_vector_load_one`
(common/common.cpp) puts it at `n_embd * (k - 1)` of a buffer, fills what lies between with zeros, and rejects k = 0,
any type but F32 and any shape but 1-D; `llama_adapter_cvec::apply` (src/llama-adapter.cpp) gives block `il`, 0-based,
the part at `n_embd * (il - 1)`, and "there's never a tensor for layer 0"; the model graphs (src/models) add it by
`build_cvec(cur, il)` after the feed-forward's residual sum, to what is named `l_out-il`. So `direction.k` is added to
the output of 0-based block k, demur's `layers.k.resid_post`; blocks may be missing; block 0 has no name. The range of
layers is 1 to the last by default. Measured too: a llama.cpp build of October 2026, given SmolLM2-135M and vectors at
k = 1, 16, 29 or 16 and 20, agrees with demur's logits as well as it does unsteered, and with those of no other block.
No metadata is looked at there; the keys are those of repeng and of llama.cpp's own generator, with the number of
tensors as `layer_count`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from torch import Tensor

from demur.errors import InputError, NotFoundError
from demur.record import whole_file

ARCHITECTURE = "controlvector"
_TENSOR = "direction."
_HINT, _COUNT, _SPEC = "controlvector.model_hint", "controlvector.layer_count", "demur.spec"


@dataclass(frozen=True)
class ControlVector:
    """What a control vector file holds. Raises `InputError` for what the format cannot say."""

    vectors: Mapping[int, Tensor]
    """0-based block to what is added to its output, [d_model] float32."""
    model_hint: str = ""
    """Architecture of the model that it is for; for people, nothing checks it."""
    spec: str = ""
    """Hash of the spec that it was made from."""

    def __post_init__(self) -> None:
        if 0 in self.vectors:
            raise InputError(
                "the spec steers block 0, for which a GGUF control vector has no name; steer block 1 or a later one, "
                "or export a .pt file"
            )
        shapes = {tuple(vector.shape) for vector in self.vectors.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise InputError(f"vectors of the shapes {sorted(shapes)} were given; expected one shape, [d_model]")


def write_control_vector(path: Path, control: ControlVector) -> None:
    """Write a GGUF file, whole or not at all."""
    with whole_file(path) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(_HINT, control.model_hint)
        writer.add_uint32(_COUNT, len(control.vectors))
        if control.spec:
            writer.add_string(_SPEC, control.spec)
        for block, vector in sorted(control.vectors.items()):
            writer.add_tensor(f"{_TENSOR}{block}", vector.detach().float().cpu().contiguous().numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def read_control_vector(path: Path) -> ControlVector:
    """Read a control vector that demur, repeng or llama.cpp wrote. Raises `NotFoundError` or `InputError`."""
    if not path.is_file():
        raise NotFoundError(f"control vector {path} does not exist; give a .gguf file")
    try:
        reader = GGUFReader(path)
        named = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # a damaged file fails in numpy, in struct or in the reader's own checks
        raise InputError(f"{path} is not a whole GGUF file ({error}); copy it again") from None
    if named.get("general.architecture") != ARCHITECTURE:
        raise InputError(
            f"{path} is a GGUF file of architecture {named.get('general.architecture')!r}, expected {ARCHITECTURE!r}"
        )
    vectors: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        number = tensor.name.removeprefix(_TENSOR)
        fits = tensor.tensor_type == GGMLQuantizationType.F32 and len(tensor.shape) == 1
        if not (tensor.name.startswith(_TENSOR) and number.isdecimal() and int(number) > 0 and fits):
            raise InputError(
                f"{path} holds {tensor.name!r} of type {tensor.tensor_type.name} and shape {tensor.shape.tolist()}; "
                "expected direction.1, direction.2, ..., each F32 with one dimension"
            )
        vectors[int(number)] = torch.tensor(tensor.data)  # copied: the reader maps the file
    if not vectors:
        raise InputError(f"{path} holds no direction; expected tensors direction.1, direction.2, ...")
    return ControlVector(vectors, str(named.get(_HINT, "")), str(named.get(_SPEC, "")))
