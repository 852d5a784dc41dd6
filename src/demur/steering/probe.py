"""Learned probes for gates: a logistic regression on the residual, or on a few SAE latents of it, at one hookpoint.

A probe is a safetensors file whose header holds its card: what it was trained on, how well it tells prompts apart, and
how its probabilities were calibrated. A spec holds the hash only; the hash covers what decides, not the card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from demur.errors import InputError, NotFoundError
from demur.record import whole_file
from demur.types import stable_hash

PROBE_FORMAT = "demur-probe/1"
Pool = Literal["token", "turn"]
"""What a probability is about. `token`: the token's own residual. `turn`: the mean over the text of the current turn so
far, which at the end of a prompt is the user's last message."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A logistic regression: probability = sigmoid(x . weight + bias)."""

    weight: Tensor
    """[d_model], or [latents]; float32."""
    bias: float
    hookpoint: str
    """Where it reads."""
    pool: Pool = "token"
    sae: str = ""
    """Hash of the SAE whose latents it reads; empty: the residual itself."""
    latents: tuple[int, ...] = ()
    """Which latents, in the order of `weight`."""
    card: Mapping[str, Any] = field(default_factory=dict)
    """How it was made and measured: JSON."""

    def __post_init__(self) -> None:
        if self.weight.ndim != 1 or (self.sae and len(self.latents) != len(self.weight)):
            raise InputError(
                f"the probe has weights of shape {tuple(self.weight.shape)} for {len(self.latents)} latents; expected "
                "one for each"
            )

    @property
    def hash(self) -> str:
        """16 hex digits over all that decides."""
        return stable_hash(
            [self.weight.float().tolist(), self.bias, self.hookpoint, self.pool, self.sae, list(self.latents)]
        )


def save_probe(path: Path, probe: Probe) -> None:
    """Write one safetensors file, whole or not at all."""
    about = {
        "bias": probe.bias,
        "hookpoint": probe.hookpoint,
        "pool": probe.pool,
        "sae": probe.sae,
        "latents": list(probe.latents),
        "card": dict(probe.card),
    }
    with whole_file(path) as temporary:
        save_file(
            {"weight": probe.weight.detach().float().contiguous().cpu()}, temporary, {PROBE_FORMAT: json.dumps(about)}
        )


def is_probe(path: Path) -> bool:
    """Whether the file says that it is one of `save_probe`; false also for a file that cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return PROBE_FORMAT in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_probe(path: Path) -> Probe:
    """Read a file of `save_probe`. Raises `NotFoundError` or `InputError`."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(PROBE_FORMAT, "null"))
            weight = file.get_tensor("weight") if "weight" in set(file.keys()) else None
    except FileNotFoundError:
        raise NotFoundError(f"probe file {path} does not exist; make one with demur gate train") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a whole safetensors file of a probe ({error}); copy it again") from None
    if not isinstance(about, dict) or weight is None:
        raise InputError(f"{path} is a safetensors file, but not a probe that demur gate train wrote")
    try:
        pool = about["pool"]
        if pool not in get_args(Pool) or not bool(weight.isfinite().all()):
            raise ValueError(f"pool {pool!r}, or a weight that is no number")
        return Probe(
            weight.float(),
            float(about["bias"]),
            str(about["hookpoint"]),
            pool,
            str(about["sae"]),
            tuple(int(latent) for latent in about["latents"]),
            about["card"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is a probe file with a header that is wrong ({error}); copy it again") from None
