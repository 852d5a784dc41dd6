"""Residuals of text: run documents through the model up to the last block needed, keep what comes out.

Tokens with a massive norm (attention sinks, mostly the first token) are left out: they are a different distribution,
and one of them weighs as much as thousands of others. On disk residuals are bfloat16 safetensors shards, shuffled
within each shard when written, each whole or absent, so that an interrupted harvest goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from demur import progress
from demur.errors import InputError
from demur.lm.batches import batches, pad
from demur.lm.load import LanguageModel
from demur.lm.record import read_at
from demur.lm.token_types import Typed
from demur.parallel import ALONE, Processes
from demur.record import from_json, read_json, whole_file, write_json
from demur.types import Hookpoint

MASSIVE = 3.0
"""Tokens whose norm exceeds this multiple of the median are left out."""
_BATCH_TOKENS = 2048
STORED = torch.bfloat16
"""Precision of residuals in shards and pools: its rounding adds about 3e-6 to an FVU."""


class Residuals(NamedTuple):
    """The residuals of some documents, in their order, massive tokens left out."""

    x: dict[str, Tensor]
    """[n, d_model] by hookpoint, in `STORED`, on the CPU."""
    types: Tensor
    """[n] uint8, index into `TYPES`."""
    seen: int
    """Tokens before any was left out."""


@dataclass(frozen=True)
class Harvest:
    """`harvest.json`: what a folder of shards holds."""

    key: str
    """Hash of the text, the model and the hookpoints."""
    norm_limits: dict[str, float]
    """Norm above which tokens were left out, by hookpoint."""


def norm_limits(lm: LanguageModel, hookpoints: Sequence[Hookpoint], rows: Sequence[Typed]) -> dict[str, float]:
    """The norm above which a token counts as massive at each hookpoint, from the documents `rows`."""
    found = _read(lm, hookpoints, rows)
    return {str(h): MASSIVE * float(torch.cat(found[str(h)]).norm(dim=-1).median()) for h in hookpoints}


def residuals(
    lm: LanguageModel, hookpoints: Sequence[Hookpoint], rows: Sequence[Typed], limits: dict[str, float]
) -> Residuals:
    """The residuals of `rows`, where they are massive at none of the hookpoints.

    Raises `InputError` where the model gives NaN or infinity.
    """
    found = {name: torch.cat(parts) for name, parts in _read(lm, hookpoints, rows).items()}
    norms = {name: x.norm(dim=-1) for name, x in found.items()}
    for name, norm in norms.items():
        if not bool(torch.isfinite(norm).all()):
            raise InputError(
                f"{lm.name} gives NaN or infinity at {name} in {lm.model.dtype}; load it in bfloat16 or float32"
            )
    kept = torch.stack([norm <= limits[name] for name, norm in norms.items()]).all(0)
    types = torch.tensor([kind for row in rows for kind in row.types], dtype=torch.uint8)
    return Residuals({name: x[kept].to(STORED) for name, x in found.items()}, types[kept], len(kept))


def shared_residuals(
    lm: LanguageModel,
    hookpoints: Sequence[Hookpoint],
    rows: Sequence[Typed],
    limits: dict[str, float],
    processes: Processes,
) -> Residuals:
    """`residuals`, each process reading its part of `rows` and all of them getting everything, in the same order."""
    if processes.size == 1 or len(rows) < processes.size:
        return residuals(lm, hookpoints, rows, limits)
    ends = [len(rows) * rank // processes.size for rank in (processes.rank, processes.rank + 1)]
    mine = residuals(lm, hookpoints, rows[ends[0] : ends[1]], limits)
    parts = processes.gather_objects(mine)
    return Residuals(
        {name: torch.cat([part.x[name] for part in parts]) for name in mine.x},
        torch.cat([part.types for part in parts]),
        sum(part.seen for part in parts),
    )


def harvest(
    lm: LanguageModel,
    hookpoints: Sequence[Hookpoint],
    groups: Sequence[Callable[[], list[Typed]]],
    key: str,
    folder: Path,
    seed: int,
    processes: Processes = ALONE,
) -> None:
    """Store the residuals of `groups` of documents in `folder`, a shard for each, shuffled with `seed`.

    Shards already there are kept; each process makes its part of the others. Raises `InputError` when `folder` holds
    the harvest of something else (another `key`).
    """
    about = folder / "harvest.json"
    if about.exists():
        found = from_json(Harvest, read_json(about), str(about))
        if found.key != key:
            raise InputError(f"{folder} holds activations of other text or another model; give another --work folder")
    else:
        found = Harvest(key, norm_limits(lm, hookpoints, groups[0]()[:32]))
        processes.wait()  # nobody may find the file that another has just written
        if processes.first:
            write_json(about, found)
    with progress.track("harvest", len(groups), "shards") as advance:
        for number, group in enumerate(groups):
            path = folder / f"shard-{number:05d}.safetensors"
            if not path.exists() and number % processes.size == processes.rank:
                made = residuals(lm, hookpoints, group(), found.norm_limits)
                order = torch.randperm(len(made.types), generator=torch.Generator().manual_seed(seed + number))
                tensors = {"types": made.types[order], **{name: x[order] for name, x in made.x.items()}}
                with whole_file(path) as temporary:
                    save_file(tensors, temporary, metadata={"seen": str(made.seen)})
            advance(1)
    processes.wait()


def _read(lm: LanguageModel, hookpoints: Sequence[Hookpoint], rows: Sequence[Typed]) -> dict[str, list[Tensor]]:
    """Residuals [tokens, d_model] in float32 on the CPU for each of `rows`, by hookpoint, padding left out."""
    lengths = [len(row.ids) for row in rows]
    found: dict[str, list[Tensor]] = {str(h): [torch.empty(0)] * len(rows) for h in hookpoints}
    for batch in batches(lengths, max(1, _BATCH_TOKENS // max(lengths))):
        padded = pad(lm, [rows[i].ids for i in batch], side="right")
        for name, x in zip(found, read_at(lm.model, hookpoints, padded.ids, padded.mask), strict=True):
            for i, row in zip(batch, x.float().cpu(), strict=True):
                found[name][i] = row[: lengths[i]]
    return found
