"""The processes that share one run: who this one is, and what they tell each other.

Started by `torchrun` (or `accelerate launch`), each process finds its rank in the environment; otherwise it is alone
and nothing is sent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """A group of equal processes."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes what all of them made."""
        return self.rank == 0

    def mean_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)
                tensor.div_(self.size)

    def any_(self, flags: Tensor) -> None:
        """Replace each of `flags` (bool) by whether it is set in some process."""
        if self.size > 1:
            numbers = flags.to(torch.uint8)
            distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX)
            flags.copy_(numbers.bool())

    def gather(self, numbers: Tensor) -> Tensor:
        """`numbers` [n] of every process, one after the other: [size x n]. n is the same everywhere."""
        if self.size == 1:
            return numbers
        parts = [torch.empty_like(numbers) for _ in range(self.size)]
        distributed.all_gather(parts, numbers.contiguous())
        return torch.cat(parts)

    def gather_objects(self, mine: T) -> list[T]:
        """What each process gives, by rank."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, mine)
        return found

    def wait(self) -> None:
        """Go on when every process is here."""
        if self.size > 1:
            distributed.barrier()


ALONE = Processes()


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that `torchrun` started, or `ALONE`. Uses nccl where `device` is a CUDA device, else gloo."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    backend = "nccl" if device.startswith("cuda") else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group(backend)
    try:
        yield Processes(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()
