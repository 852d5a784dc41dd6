"""Learned probes for gates: a logistic regression on the residual, or on a few SAE latents of it, at one hookpoint, or
a small network whose heads attend to the tokens of a turn.

A probe is a safetensors file whose header holds its card: what it was trained on, how well it tells prompts apart, and
how its probabilities were calibrated. A spec holds the hash only; the hash covers what decides, not the card.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from demur.errors import InputError
from demur.steering.vector_file import read_vector, write_vector, wrong
from demur.types import stable_hash

PROBE_FORMAT = "demur-probe/1"
Pool = Literal["token", "turn", "attention"]
"""What a probability is about. `token`: the token's own residual. `turn`: the mean over the text of the current turn so
far, which at the end of a prompt is the user's last message. `attention`: means over the same text, each weighted by
what a head of the probe attends to."""
_CAP = 8.0


def bounded(scores: Tensor) -> Tensor:
    """Attention scores held between -8 and 8, so that sums of their exponentials lose no precision."""
    return _CAP * torch.tanh(scores / _CAP)


@dataclass(frozen=True, eq=False)
class Attention:
    """What the tokens of a turn are turned into before they are weighted and averaged: `units` values, relu(x . hidden
    + offset), and of each head a score. After McKenzie et al. (arXiv 2506.10805), with a layer before the heads."""

    hidden: Tensor
    """[d_model, units]; float32."""
    offset: Tensor
    """[units]"""
    query: Tensor
    """[units, heads]"""

    def to(self, device: torch.device) -> Attention:
        """The same on a device."""
        return Attention(self.hidden.to(device), self.offset.to(device), self.query.to(device))

    def __call__(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """[..., heads] each: what every token says, and how much it counts, for `x` [..., d_model] and the heads'
        `weight` [units, heads]."""
        units = torch.relu(x.float() @ self.hidden + self.offset)
        return units @ weight, bounded(units @ self.query).exp()


@dataclass(frozen=True, eq=False)
class Probe:
    """A logistic regression: probability = sigmoid(x . weight + bias), or one of several heads, summed."""

    weight: Tensor
    """[d_model], or [latents], or of `attention` [units, heads]; float32."""
    bias: float
    hookpoint: str
    """Where it reads."""
    pool: Pool = "token"
    sae: str = ""
    """Hash of the SAE whose latents it reads; empty: the residual itself."""
    latents: tuple[int, ...] = ()
    """Which latents, in the order of `weight`."""
    attention: Attention | None = None
    """What the heads see and attend to; with pool `attention`, and only then."""
    card: Mapping[str, Any] = field(default_factory=dict)
    """How it was made and measured: JSON."""

    def __post_init__(self) -> None:
        if (self.attention is not None) != (self.pool == "attention") or (self.attention is not None and self.sae):
            raise InputError(
                f"the probe pools by {self.pool}, has {'an' if self.attention else 'no'} attention layer and reads "
                f"{'SAE latents' if self.sae else 'the residual'}; a layer goes with pool attention on the residual"
            )
        if self.attention is not None:
            d, units = self.attention.hidden.shape
            heads = self.attention.query.shape[-1]
            if self.attention.offset.shape != (units,) or not (
                self.attention.query.shape == self.weight.shape == (units, heads)
            ):
                raise InputError(
                    f"the probe's layers have shapes {(d, units)}, {tuple(self.attention.offset.shape)}, "
                    f"{tuple(self.attention.query.shape)} and {tuple(self.weight.shape)}, which do not fit together"
                )
        elif self.weight.ndim != 1 or (self.sae and len(self.latents) != len(self.weight)):
            raise InputError(
                f"the probe has weights of shape {tuple(self.weight.shape)} for {len(self.latents)} latents; expected "
                "one for each"
            )

    @property
    def hash(self) -> str:
        """16 hex digits over all that decides."""
        about = [self.bias, self.hookpoint, self.pool, self.sae, list(self.latents)]
        if self.attention is None:
            return stable_hash([self.weight.float().tolist(), *about])
        layers = [self.weight, self.attention.hidden, self.attention.offset, self.attention.query]
        digests = [hashlib.sha256(one.float().cpu().contiguous().numpy().tobytes()).hexdigest() for one in layers]
        return stable_hash([*digests, *about])

    @property
    def width(self) -> int:
        """How many numbers it reads of a token."""
        return len(self.weight if self.attention is None else self.attention.hidden)

    def logits(self, x: Tensor, lengths: Tensor) -> Tensor:
        """[rows] what it says of `x` [rows, width], or with `attention` of [tokens, width], row after row, row r being
        `lengths[r]` tokens."""
        if self.attention is None:
            return x @ self.weight + self.bias
        said, counts = self.attention(x, self.weight)
        row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        sums = torch.zeros(2, len(lengths), said.shape[1]).index_add_(1, row, torch.stack([said * counts, counts]))
        return torch.where(lengths > 0, (sums[0] / sums[1]).sum(1) + self.bias, -torch.inf)


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
    tensors = {"weight": probe.weight} | (vars(probe.attention) if probe.attention is not None else {})
    write_vector(path, PROBE_FORMAT, tensors, about)


def load_probe(path: Path) -> Probe:
    """Read a file of `save_probe`. Raises `NotFoundError` or `InputError`."""
    about, tensors = read_vector(path, PROBE_FORMAT, "probe", "demur gate train")
    try:
        pool = about["pool"]
        if pool not in get_args(Pool):
            raise ValueError(f"pool {pool!r}")
        layers = {name: tensors[name] for name in ("hidden", "offset", "query")} if pool == "attention" else {}
        return Probe(
            tensors["weight"],
            float(about["bias"]),
            str(about["hookpoint"]),
            pool,
            str(about["sae"]),
            tuple(int(latent) for latent in about["latents"]),
            Attention(**layers) if layers else None,
            about["card"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise wrong(path, "probe", error) from None
