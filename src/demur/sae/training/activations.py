"""Batches of residuals to train on: from shards on disk, or from pools that are made when they are needed.

Both give the same batches whenever and wherever a run goes on, and each process its share of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from demur.errors import InputError
from demur.parallel import ALONE, Processes

_STRIPE = 32
"""Neighbouring tokens of a shard that stay together; shards were shuffled when written, so they are no neighbours of
each other in the text."""
TYPES = "types"
"""Name of the token types in a shard; every other tensor is named by its hookpoint."""


class Position(NamedTuple):
    """Where a stream of batches stands."""

    round: int = 0
    """Passes over the shards, or pools, that are done."""
    batch: int = 0
    """Batches given in this round."""


class Batch(NamedTuple):
    """One step's worth of tokens."""

    x: dict[str, Tensor]
    """Raw residuals [rows, d_in] by hookpoint, this process's share, as stored."""
    after: Position
    """Where the next batch begins."""


def share(batch_size: int, processes: Processes) -> int:
    """Rows of a batch that each process takes. Raises `InputError` when they cannot be equal."""
    if batch_size % processes.size:
        raise InputError(
            f"a batch of {batch_size} tokens cannot be shared equally by {processes.size} processes; "
            f"choose a multiple of {processes.size}"
        )
    return batch_size // processes.size


class Shards:
    """A folder of shards: safetensors files, each shuffled when written.

    Memory: files are mapped, so only what a batch takes is read; the operating system may keep more.
    """

    def __init__(self, folder: Path, processes: Processes = ALONE) -> None:
        """Raises `InputError` when a shard is cut short or its tensors disagree."""
        self._processes = processes
        paths = sorted(folder.glob("shard-*.safetensors"))
        self._shards: list[dict[str, Tensor]] = []
        self.seen = 0
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    self.seen += int((file.metadata() or {})["seen"])
                    self._shards.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            except (SafetensorError, KeyError, OSError, ValueError) as error:
                raise InputError(
                    f"{path} is not a whole shard ({error}); delete it and run the same command again"
                ) from None
            wrong = [name for name, t in self._shards[-1].items() if name != TYPES and not t.is_floating_point()]
            if wrong:
                raise InputError(
                    f"{path}: {wrong[0]} is {self._shards[-1][wrong[0]].dtype}, expected a floating-point type; "
                    "harvest again"
                )
            sizes = {len(tensor) for tensor in self._shards[-1].values()}
            if len(sizes) != 1 or self._shards[-1].keys() != self._shards[0].keys():
                raise InputError(f"{path} holds tensors that do not belong together; delete it and run again")
        if not self._shards:
            raise InputError(f"{folder} holds no shards; run the harvest first")
        self.hookpoints = tuple(name for name in self._shards[0] if name != TYPES)
        self._sizes = [len(shard[self.hookpoints[0]]) for shard in self._shards]
        self.tokens = sum(self._sizes)

    @property
    def left_out(self) -> float:
        """Share of tokens left out for a massive norm."""
        return 1 - self.tokens / self.seen

    def sample(self, hookpoint: str, tokens: int) -> Tensor:
        """The first `tokens` residuals, float32 [n, d_in]: what scale and initialisation are fitted on."""
        parts, left = [], tokens
        for shard in self._shards:
            parts.append(shard[hookpoint][:left].float())
            left -= len(parts[-1])
            if left <= 0:
                break
        return torch.cat(parts)

    def residuals(self, hookpoint: str) -> Iterator[tuple[Tensor, Tensor]]:
        """All stored residuals [n, d_in] with their token types [n], shard by shard."""
        return ((shard[hookpoint], shard[TYPES]) for shard in self._shards)

    def steps_per_round(self, batch_size: int) -> int:
        """Batches in one pass. Raises `InputError` where there is not one."""
        steps = sum(size // _STRIPE for size in self._sizes) * _STRIPE // batch_size
        if not steps:
            raise InputError(f"{self.tokens} tokens are fewer than one batch of {batch_size}; give more text")
        return steps

    def batches(self, batch_size: int, seed: int, start: Position = Position()) -> Iterator[Batch]:  # noqa: B008
        """Endless passes from `start` on; each draws stripes of all shards in another order."""
        steps = self.steps_per_round(batch_size)
        rows = share(batch_size, self._processes)
        number, first = start
        while True:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            stripes = self._stripes(generator)
            for batch in range(first, steps):
                begin = batch * batch_size + self._processes.rank * rows
                x = {name: self._rows(name, stripes, begin, begin + rows) for name in self.hookpoints}
                yield Batch(x, _next(number, batch, steps))
            number, first = number + 1, 0

    def _stripes(self, generator: torch.Generator) -> list[tuple[int, int]]:
        """(shard, first row) of every stripe, in random order."""
        found = []
        for shard, size in enumerate(self._sizes):
            # the rows that fill no stripe are others in each pass
            offset = int(torch.randint(size % _STRIPE + 1, (1,), generator=generator))
            found += [(shard, offset + i * _STRIPE) for i in range(size // _STRIPE)]
        return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]

    def _rows(self, hookpoint: str, stripes: list[tuple[int, int]], begin: int, end: int) -> Tensor:
        """Rows `begin` to `end` of the tokens that `stripes` line up."""
        parts = []
        while begin < end:
            shard, row = stripes[begin // _STRIPE]
            inside = begin % _STRIPE
            taken = min(_STRIPE - inside, end - begin)
            parts.append(self._shards[shard][hookpoint][row + inside : row + inside + taken])
            begin += taken
        return torch.cat(parts)


class Pools:
    """Batches from pools of residuals that `make` gives by number, mixed two at a time and never stored.

    Round r mixes the second half of pool r - 1 with the first half of pool r, so that a batch holds text of both, each
    token is used once, and a run can go on at any round from its number alone. Memory: two pools.
    """

    def __init__(self, make: Callable[[int], dict[str, Tensor]], processes: Processes = ALONE) -> None:
        """`make(number)` gives residuals [n, d_in] by hookpoint, the same on every process and on every call."""
        self._make, self._processes = make, processes

    def batches(self, batch_size: int, seed: int, start: Position = Position()) -> Iterator[Batch]:  # noqa: B008
        """Endless batches from `start` on. A round's last tokens that fill no batch are left out."""
        rows = share(batch_size, self._processes)
        number, first = start
        before = self._shuffled(number - 1, seed) if number else None
        while True:
            pool = self._shuffled(number, seed)
            size = len(next(iter(pool.values())))
            mixed = {name: [x[: size // 2]] for name, x in pool.items()}
            for name, x in (before or {}).items():
                mixed[name].append(x[len(x) // 2 :])
            order = torch.randperm(
                sum(map(len, next(iter(mixed.values())))), generator=_generator(seed, number, "round")
            )
            steps = len(order) // batch_size
            if not steps:
                raise InputError(
                    f"a pool holds {len(order)} tokens, fewer than a batch of {batch_size}; give larger pools or "
                    "more text"
                )
            round_x = {name: torch.cat(parts) for name, parts in mixed.items()}
            for batch in range(first, steps):
                begin = batch * batch_size + self._processes.rank * rows
                chosen = order[begin : begin + rows]
                yield Batch({name: x[chosen] for name, x in round_x.items()}, _next(number, batch, steps))
            before, number, first = pool, number + 1, 0

    def _shuffled(self, number: int, seed: int) -> dict[str, Tensor]:
        pool = self._make(number)
        order = torch.randperm(len(next(iter(pool.values()))), generator=_generator(seed, number, "pool"))
        return {name: x[order] for name, x in pool.items()}


def _next(number: int, batch: int, steps: int) -> Position:
    """Where the batch after `batch` of the `steps` of round `number` begins."""
    return Position(number + 1, 0) if batch + 1 == steps else Position(number, batch + 1)


def _generator(seed: int, number: int, what: str) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number) * 2 + (what == "round"))
