"""What the custom op reads about each token of a step: fixed memory, as CUDA graphs need, filled before the step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]


class Buffers:
    """For `tokens` tokens a step, `rows` requests, and counts under `labels` labels.

    `spec` [tokens]: number of the spec that edits the token, 0 for none. `who` [tokens]: number of its request's spec.
    `look` [tokens]: number of the spec whose gate looks at it, plus `Table.monitor` where its monitor does, else 0.
    `row` [tokens]: its request's row; `rows` itself for padding. `first` [tokens]: index of its request's first token
    in this step.
    """

    def __init__(self, tokens: int, rows: int, labels: int, device: torch.device) -> None:
        self._host: Ints = np.zeros((5, tokens), dtype=np.int64)
        on_cpu = device.type == "cpu"
        self._device = torch.from_numpy(self._host) if on_cpu else torch.zeros(5, tokens, dtype=torch.long).to(device)
        self._on_cpu = on_cpu
        self._dirty = tokens
        self._trash = rows
        self.spec, self.who, self.look, self.row, self.first = self._device.unbind(0)
        self.gate_open = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        """[rows + 1] 1 where the request's gate has opened."""
        self.label = torch.zeros(rows + 1, dtype=torch.long, device=device)
        """[rows + 1] what the request counts under."""
        self.passed = torch.zeros(tokens, dtype=torch.bool, device=device)
        """[tokens] the request's gate was open at the token."""
        self.opened = torch.zeros(labels, dtype=torch.long, device=device)
        """[labels] gates that opened."""
        self.steered = torch.zeros(labels, dtype=torch.long, device=device)
        """[labels] tokens edited behind open gates."""
        self.places: dict[int, Tensor] = {}
        """For a CPU: indices of the tokens that are edited or looked at, by block; absent for none."""
        self.guarded = False
        """For a CPU: some request of the step has a gate."""
        self.clear()

    def clear(self) -> None:
        """Steer nothing."""
        self.fill(*np.zeros((5, 0), dtype=np.int64))
        self.places = {}

    @property
    def idle(self) -> bool:
        """Whether nothing is steered as it stands."""
        return self._dirty == 0

    def fill(self, spec: Ints, who: Ints, look: Ints, row: Ints, first: Ints) -> None:
        """The step's tokens; all that come after them are padding."""
        n, end = len(spec), max(len(spec), self._dirty)
        host = self._host
        host[:, :n] = spec, who, look, row, first
        host[:3, n:end] = 0
        host[3, n:end] = self._trash
        host[4, n:end] = np.arange(n, end)
        self._dirty = n
        if not self._on_cpu and end:
            staged = torch.from_numpy(host[:, :end].copy()).pin_memory()
            self._device[:, :end].copy_(staged, non_blocking=True)
