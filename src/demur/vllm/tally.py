"""Counts of a worker in a small file that the process which answers `/metrics` reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from demur.vllm.buffers import Buffers
from demur.vllm.requests import Requests

FOLDER = "DEMUR_METRICS_DIR"
"""Environment variable: where the files are. Set by the first process for those that it starts."""
NAMES = ("tokens_steered", "requests_gated", "gates_opened")
"""What is counted, by spec: rows of the file."""
_ENDING = ".counts"


class Tally:
    """Copies what `requests` and `buffers` have counted into the file after every step, without waiting for the device:
    what happens on the device is a step behind."""

    def __init__(self, labels: Sequence[str], requests: Requests, buffers: Buffers, first: bool) -> None:
        """`first`: whether this worker also writes what all of them count."""
        self._requests, self._buffers, self._first = requests, buffers, first
        folder = os.environ.get(FOLDER, "")
        self._file = _made(Path(folder) / f"{os.getpid()}{_ENDING}", len(labels)) if folder else None
        on_cpu = buffers.steered.device.type == "cpu"
        self._seen = torch.zeros(2, len(labels), dtype=torch.long, pin_memory=not on_cpu)

    def report(self) -> None:
        """Write."""
        if self._file is None:
            return
        seen = self._seen.numpy()
        plain = self._requests.steered if self._first else 0
        self._file[0], self._file[2] = plain + seen[0], seen[1]
        if self._first:
            self._file[1] = self._requests.gated
        self._seen[0].copy_(self._buffers.steered, non_blocking=True)
        self._seen[1].copy_(self._buffers.opened, non_blocking=True)


def _made(path: Path, labels: int) -> np.memmap[tuple[int, int], np.dtype[np.int64]] | None:
    try:
        return np.memmap(path, dtype=np.int64, mode="w+", shape=(len(NAMES), labels))
    except OSError:  # another host's folder: counts are not worth an answer
        return None


def read_tallies(folder: Path, labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """The counts in a folder, added up: by name, by spec."""
    total = np.zeros((len(NAMES), len(labels)), dtype=np.int64)
    for path in sorted(folder.glob(f"*{_ENDING}")):
        found = np.fromfile(path, dtype=np.int64)
        if found.size == total.size:
            total += found.reshape(total.shape)
    return {name: dict(zip(labels, row.tolist(), strict=True)) for name, row in zip(NAMES, total, strict=True)}
