"""What every trainer of `benchmarks/sae_training.py` is given and gives back. Runs in the environment of each."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Job = dict[str, Any]
"""`train`, `heldout`: safetensors files with raw residuals `x` [n, d_in]; `d_sae`, `k`, `batch`, `steps`, `seed`,
`threads`; `lr` (null: the trainer's own); `evaluate_at` (steps); `out` (JSON to write); and options of one trainer."""


def unexplained(x: Tensor, reconstruct: Callable[[Tensor], Tensor]) -> float:
    """Fraction of the variance of `x` [n, d_in] that its reconstruction misses, in float64."""
    mean = x.double().mean(0)
    error = total = 0.0
    with torch.no_grad():
        for part in x.split(4096):
            error += float((part.double() - reconstruct(part).double()).square().sum())
            total += float((part.double() - mean).square().sum())
    return error / total


class Log:
    """Seconds of each step, and held-out FVU after some of them."""

    def __init__(self, job: Job) -> None:
        self.train, self.heldout = load_file(job["train"])["x"], load_file(job["heldout"])["x"]
        self.numbers = (torch.arange(job["steps"] * job["batch"]) % len(self.train)).view(job["steps"], job["batch"])
        """Which rows of `train` each step takes."""
        self.seconds: list[float] = []
        self._curve: list[tuple[int, float, float]] = []
        self._looks = {*job["evaluate_at"], *([job["steps"]] if job["evaluate_at"] else [])}
        self._batch = job["batch"]

    @property
    def due(self) -> bool:
        """Whether the step that has just ended is one to evaluate after."""
        return len(self.seconds) in self._looks

    def look(self, reconstruct: Callable[[Tensor], Tensor]) -> None:
        """Evaluate what `reconstruct` makes of raw residuals."""
        fvu = unexplained(self.heldout, reconstruct)
        self._curve.append((len(self.seconds), sum(self.seconds), fvu))
        print(f"  step {len(self.seconds)}: held-out FVU {fvu:.4f}", file=sys.stderr, flush=True)

    def result(self, name: str, version: str, lr: float, **settings: Any) -> Job:
        """What goes into the JSON file."""
        return {
            "name": name,
            "version": version,
            "tokens_per_s": self._batch / statistics.median(self.seconds[3:] or self.seconds),
            "step_seconds": self.seconds,
            "curve": self._curve,
            "lr": lr,
            "settings": {**settings, "torch": torch.__version__, "threads": torch.get_num_threads()},
        }


def run(train: Callable[[Job], Job]) -> None:
    """Train as the job file on the command line says."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    Path(job["out"]).write_text(json.dumps(train(job)), encoding="utf-8")
