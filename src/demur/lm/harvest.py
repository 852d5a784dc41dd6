"""Harvest residuals to disk: run texts through the model up to one block and store what comes out.

A folder of safetensors shards in float16, each whole or absent, so that an interrupted harvest goes on. Tokens with
a massive norm (attention sinks, mostly the first token) are left out: they are a different distribution, and one of
them weighs as much as thousands of others. Documents are shuffled by whoever gives them; shards keep their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from demur import progress
from demur.errors import InputError
from demur.lm.batches import Row, batches, pad
from demur.lm.load import LanguageModel
from demur.lm.record import read
from demur.record import from_json, read_json, whole_file, write_json
from demur.types import Hookpoint, stable_hash

MASSIVE = 3.0
"""Tokens whose norm exceeds this multiple of the median are left out."""
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Harvest:
    """`harvest.json`: what a folder of shards holds."""

    rows: str
    """Hash of the token ids, the model's fingerprint and the hookpoint."""
    shards: int
    documents: int
    norm_limit: float
    """Norm above which tokens were left out."""


def harvest(
    lm: LanguageModel, hookpoint: Hookpoint, rows: Sequence[Row], folder: Path, rows_per_shard: int = 256
) -> Harvest:
    """Store the residuals of `rows` (token ids, one document each) at `hookpoint` as shards in `folder`.

    Shards already there are kept. Raises `InputError` when `folder` holds the harvest of something else.
    """
    key = stable_hash([[list(row) for row in rows], lm.fingerprint, str(hookpoint), rows_per_shard])
    about = folder / "harvest.json"
    n_shards = math.ceil(len(rows) / rows_per_shard)
    if about.exists():
        found = from_json(Harvest, read_json(about), str(about))
        if found.rows != key:
            raise InputError(f"{folder} holds activations of other text or another model; give another --work folder")
    else:
        sample = torch.cat(list(_residuals(lm, hookpoint, rows[:32])))
        limit = MASSIVE * float(sample.norm(dim=-1).median())
        found = Harvest(key, n_shards, len(rows), limit)
        write_json(about, found)
    with progress.track("harvest", sum(map(len, rows)), "tokens") as advance:
        for number in range(n_shards):
            group = rows[number * rows_per_shard : (number + 1) * rows_per_shard]
            path = shard_path(folder, number)
            if not path.exists():
                kept, seen = [], 0
                for residual in _residuals(lm, hookpoint, group):
                    seen += len(residual)
                    kept.append(residual[residual.norm(dim=-1) <= found.norm_limit].half().cpu())
                    advance(len(residual))
                with whole_file(path) as temporary:
                    save_file({"activations": torch.cat(kept)}, temporary, metadata={"seen": str(seen)})
            else:
                advance(sum(map(len, group)))
    return found


def shard_path(folder: Path, number: int) -> Path:
    """Where shard `number` of a harvest is."""
    return folder / f"shard-{number:05d}.safetensors"


class Shards:
    """The stored activations of a harvest, as shuffled batches of float32 residuals [batch, d_in]."""

    def __init__(self, folder: Path, harvest: Harvest, batch_size: int, seed: int, buffer_shards: int = 32) -> None:
        self._paths = [shard_path(folder, number) for number in range(harvest.shards)]
        self._batch_size, self._seed, self._buffer = batch_size, seed, buffer_shards
        self.tokens = self.seen = 0
        for path in self._paths:
            with safe_open(path, framework="pt") as file:
                self.tokens += file.get_slice("activations").get_shape()[0]
                self.seen += int(file.metadata()["seen"])
        self.steps_per_epoch = self.tokens // batch_size
        if not self.steps_per_epoch:
            raise InputError(f"{self.tokens} tokens are fewer than one batch of {batch_size}; give more text")

    @property
    def left_out(self) -> float:
        """Share of tokens left out for a massive norm."""
        return 1 - self.tokens / self.seen

    def sample(self) -> Tensor:
        """The first shard, float32 [n, d_in]: what scale and initialisation are fitted on."""
        return load_file(self._paths[0])["activations"].float()

    def __iter__(self) -> Iterator[Tensor]:
        """All stored residuals in order, by shard."""
        for path in self._paths:
            yield load_file(path)["activations"].float()

    def batches(self, first_step: int) -> Iterator[Tensor]:
        """Endless epochs from `first_step` on. Each shuffles the shards, then the tokens of a buffer of them.

        Memory: `buffer_shards` shards in float16 and one batch.
        """
        epoch, skip = divmod(first_step, self.steps_per_epoch)
        while True:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(len(self._paths), generator=generator).tolist()
            left: Tensor | None = None
            given = 0
            for start in range(0, len(order), self._buffer):
                parts = [load_file(self._paths[i])["activations"] for i in order[start : start + self._buffer]]
                pool = torch.cat(parts)
                pool = pool[torch.randperm(len(pool), generator=generator)]
                if left is not None:
                    pool = torch.cat([left, pool])
                whole = len(pool) // self._batch_size * self._batch_size
                for batch in pool[:whole].split(self._batch_size):
                    if given >= skip:
                        yield batch.float()
                    given += 1
                left = pool[whole:]
            epoch, skip = epoch + 1, 0


def _residuals(lm: LanguageModel, hookpoint: Hookpoint, rows: Sequence[Row]) -> Iterator[Tensor]:
    """Residuals [n, d_model] of `rows` in float32, batch by batch, padding left out."""
    lengths = [len(row) for row in rows]
    for batch in batches(lengths, max(1, _BATCH_TOKENS // max(lengths))):
        padded = pad(lm, [rows[i] for i in batch], side="right")
        residual = read(lm.model, hookpoint, padded.ids, padded.mask).residual
        yield residual[padded.mask.bool()].float()
