"""What happens at one block: the residual is read, gates decide, and the change is written into it once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from demur.vllm.bank import Bank
from demur.vllm.buffers import Buffers
from demur.vllm.needs import Through


class Place:
    """The banks at one block."""

    def __init__(
        self,
        block: int,
        banks: Mapping[Through, Bank],
        buffers: Buffers,
        specs: int,
        device: torch.device,
        static: bool,
    ) -> None:
        self.block, self.banks = block, dict(banks)
        self.calls = 0
        """How often the op was run here: the proof that it is part of the model."""
        self._buffers, self._static = buffers, static
        self.gate_here = torch.zeros(specs, dtype=torch.bool, device=device)
        """[specs] the spec's gate reads at this block."""
        self.gated = torch.zeros(specs, dtype=torch.bool, device=device)
        """[specs] the spec has a gate, here or at a lower block."""

    def apply(self, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit the sum of `hidden` and `residual` [n, d_model], by a change of `hidden` in place.

        vLLM's blocks return the residual stream in these two parts; the next block adds them.
        """
        self.calls += 1
        at: Tensor | None = None
        if not self._static:
            at = self._buffers.places.get(self.block)
            if at is None:
                return
            if len(at) == len(hidden):
                at = None
        delta = self._delta(hidden, residual, at)
        if at is None:
            hidden.add_(delta.to(hidden.dtype))
        else:
            hidden.index_add_(0, at, delta.to(hidden.dtype))

    def _delta(self, hidden: Tensor, residual: Tensor | None, at: Tensor | None) -> Tensor:
        """The change of the tokens `at` (None for all), in float32."""
        n = len(hidden)
        x = _some(hidden, at).float()
        if residual is not None:
            x = x + _some(residual, at).float()
        spec, look = _some(self._buffers.spec[:n], at), _some(self._buffers.look[:n], at)
        reads = [(bank, *bank.read(x, spec, look)) for bank in self.banks.values() if not bank.empty]
        guarded = self._static or self._buffers.guarded
        if guarded:
            fired = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            for bank, f, _ in reads:
                fired = fired | bank.fires(f, look)
            self._decide(fired if at is None else fired.new_zeros(n).index_copy_(0, at, fired), n)
        delta = torch.zeros_like(x)
        for bank, f, scale in reads:
            sizes = bank.sizes(f, spec)
            if guarded:
                sizes = sizes * (_some(self._buffers.passed[:n], at) | ~self.gated[spec]).unsqueeze(1)
            delta = delta + bank.added(sizes if scale is None else sizes * scale)
        return delta

    def _decide(self, fired: Tensor, n: int) -> None:
        """Open the gates that read here and have `fired` [n]: from the token on at which they did, for good."""
        buffers = self._buffers
        who, row, first = buffers.who[:n], buffers.row[:n], buffers.first[:n]
        count = fired.long().cumsum(0)
        since = count - count[first] + fired[first]
        before = buffers.gate_open.clone()
        opened = (before[row] > 0) | (since > 0)
        buffers.gate_open.scatter_reduce_(0, row, opened.int(), "amax")
        passed = buffers.passed[:n]
        here = self.gate_here[who]
        passed.copy_(torch.where(here, opened, passed))
        buffers.opened.index_add_(0, buffers.label, (buffers.gate_open - before).long())
        steered = (here & opened & (buffers.spec[:n] > 0)).long()
        buffers.steered.index_add_(0, buffers.label[row], steered)


def _some(values: Tensor, at: Tensor | None) -> Tensor:
    return values if at is None else values[at]
