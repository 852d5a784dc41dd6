"""Load any Hugging Face causal language model: hub id, local folder, GGUF file, or the embedded one by name."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from demur.errors import InputError, NotFoundError
from demur.lm import embedded
from demur.lm.hookpoints import blocks, width
from demur.lm.quiet import quiet_transformers


@dataclass(frozen=True)
class LanguageModel:
    """A model, its tokenizer, and what identifies them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """The hub id where known, else the path it was loaded from."""
    origin: str
    """Where the weights came from: `hub`, `folder`, `gguf` or `memory`."""
    fingerprint: str
    """Hash of architecture and norm weights: the same for every precision and quantisation of one checkpoint,
    because quantisers leave norm weights alone; different for a base model, its chat model and a full fine-tune. A
    fine-tune that leaves the norms alone (LoRA, abliteration) keeps it; `weights` tells those apart."""
    weights: str
    """Hash of a sample of every weight as loaded: two runs with one hash used the same numbers."""

    @property
    def identity(self) -> str:
        """Name, origin and weights in one text: equal only for the same numbers under the same name."""
        return f"{self.name} ({self.origin}, weights {self.weights})"

    @property
    def n_blocks(self) -> int:
        """Transformer blocks."""
        return len(blocks(self.model))

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return width(self.model)

    @property
    def context(self) -> int | None:
        """Tokens that the model reads at most, its answer counted; None where its config does not say."""
        found = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.device

    @property
    def eos_ids(self) -> set[int]:
        """Token ids that end an answer."""
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = {configured} if isinstance(configured, int) else set(configured or ())
        return {int(i) for i in (*ids, self.tokenizer.eos_token_id) if i is not None}

    @property
    def pad_id(self) -> int:
        """A token id for padding; masked everywhere, so any will do where the tokenizer names none."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else min(self.eos_ids, default=0)


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, origin: str) -> LanguageModel:
    """A `LanguageModel` around a model the caller already has."""
    return LanguageModel(model.eval(), tokenizer, name, origin, fingerprint(model), weights_hash(model))


def load(name: str, dtype: str = "float32", device: str = "cpu", revision: str = "") -> LanguageModel:
    """Load a chat model for inference.

    `name`: `smollm2-135m-instruct` (embedded), a hub id, a folder written by `save_pretrained`, or a `.gguf` file.
    `dtype`: a torch dtype name. `device`: `cpu`, `cuda`, `cuda:1`, or `auto` (spread by accelerate).
    Raises `NotFoundError` when there is no such model, `InputError` for a bad dtype or an unusable file,
    `DownloadError` when the embedded model cannot be fetched.
    """
    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype):
        raise InputError(f"dtype {dtype!r} is not a torch dtype; use float32, bfloat16 or float16")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for but torch sees no CUDA device; use device cpu")
    where: dict[str, Any] = {"dtype": torch_dtype, "device_map": "auto" if device == "auto" else None}
    path = Path(name).expanduser()
    if name == embedded.NAME:
        folder, origin = embedded.fetch()
        return _open(folder, embedded.HUB_ID, origin, where, device)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise NotFoundError(f"model file {name} does not exist; give the path of a .gguf file")
        return _open(path.parent, name, "gguf", {**where, "gguf_file": path.name}, device)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"folder {name} holds no config.json; give a folder written by save_pretrained")
        return _open(path, name, "folder", where, device)
    return _open(name, name, "hub", {**where, **({"revision": revision} if revision else {})}, device)


def _open(source: str | Path, name: str, origin: str, where: dict[str, Any], device: str) -> LanguageModel:
    same = {key: where[key] for key in ("gguf_file", "revision") if key in where}
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **same)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, trust_remote_code=False, output_loading_info=True, **where
            )
            model, info = loaded
            model = model if device == "auto" else model.to(device)
        except Exception as error:  # OSError, ValueError, SafetensorError, RuntimeError, ...
            raise NotFoundError(
                f"model {name!r} could not be loaded ({_first_line(error)}); give the hub id, the folder or the "
                f".gguf file of a chat model, or {embedded.NAME}; a gated model needs `hf auth login` first"
            ) from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"model {name!r} lacks {len(missing)} of its weights ({missing[0]} and so on), which would be random; "
            "give a whole checkpoint of a causal language model"
        )
    return wrap(model, tokenizer, name, origin)


def fingerprint(model: PreTrainedModel) -> str:
    """See `LanguageModel.fingerprint`; 16 hex digits."""
    digest = hashlib.sha256(f"{model.config.model_type} {len(blocks(model))}".encode())
    for key, value in sorted(model.state_dict().items()):
        if value.is_meta:
            raise InputError("part of the model is offloaded to disk; give it enough memory, or choose a smaller model")
        if value.ndim == 1 and ("norm" in key or "ln_" in key):
            digest.update(value.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__


def weights_hash(model: PreTrainedModel) -> str:
    """See `LanguageModel.weights`; 16 hex digits."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        flat = value.detach().flatten()
        sample = flat[:: max(1, len(flat) // 256)].to("cpu", torch.float32)
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
