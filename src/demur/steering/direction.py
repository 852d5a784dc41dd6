"""Raw directions of the residual, so that baselines run through the same engine as SAE latents.

Difference in means (Arditi et al., arXiv 2406.11717): mean residual of harmful minus of harmless prompts. CAA
(Panickssery et al., arXiv 2312.06681): mean of the differences of pairs, which for whole pairs is the same formula.
A direction is a file of its own, named by its hash; a spec holds the hash only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from demur.errors import InputError
from demur.steering.vector_file import read_vector, write_vector, wrong
from demur.types import stable_hash

_FORMAT = "demur-direction/1"


@dataclass(frozen=True)
class Direction:
    """A vector in the residual stream, in raw units."""

    vector: Tensor
    """[d_model] float32."""
    hookpoint: str
    """Where it was measured."""
    method: str = ""
    """How, e.g. `difference in means of 24 + 24 prompts`."""
    sigma: float = 0.0
    """Standard deviation of the residual along it on the text it was measured on; 0 where unknown."""

    @property
    def hash(self) -> str:
        """16 hex digits over vector and hookpoint."""
        return stable_hash([self.vector.float().tolist(), self.hookpoint, self.sigma])

    def length(self, unit: str) -> float:
        """Length in raw units of one `unit`: the vector itself, or one standard deviation along it."""
        if unit == "direction":
            return float(self.vector.float().norm())
        if not self.sigma > 0:
            raise InputError(
                f"direction {self.hash} was saved without a standard deviation, which the unit sigma needs; "
                "use the unit direction"
            )
        return self.sigma


def difference_in_means(positive: Tensor, negative: Tensor, hookpoint: str) -> Direction:
    """Mean of `positive` [n, d_model] minus mean of `negative` [m, d_model]; sigma over both, as they come."""
    if positive.ndim != 2 or negative.ndim != 2 or not len(positive) or not len(negative):
        raise InputError(
            f"residuals of shape {tuple(positive.shape)} and {tuple(negative.shape)} were given; expected [n, d_model]"
        )
    vector = positive.float().mean(0) - negative.float().mean(0)
    unit = torch.nn.functional.normalize(vector, dim=0)
    sigma = float((torch.cat([positive, negative]).float() @ unit).std(correction=0))
    method = f"difference in means of {len(positive)} and {len(negative)} residuals"
    return Direction(vector, hookpoint, method, sigma)


def save_direction(path: Path, direction: Direction) -> None:
    """Write one safetensors file, whole or not at all."""
    about = {"hookpoint": direction.hookpoint, "method": direction.method, "sigma": direction.sigma}
    write_vector(path, _FORMAT, {"vector": direction.vector}, about)


def load_direction(path: Path) -> Direction:
    """Read a file of `save_direction`. Raises `NotFoundError` or `InputError`."""
    about, tensors = read_vector(path, _FORMAT, "direction", "demur.steering.direction.save_direction")
    try:
        vector = tensors["vector"]
        if vector.ndim != 1:
            raise ValueError(f"a vector of shape {tuple(vector.shape)}")
        return Direction(vector, str(about["hookpoint"]), str(about["method"]), float(about["sigma"]))
    except (KeyError, TypeError, ValueError) as error:
        raise wrong(path, "direction", error) from None
