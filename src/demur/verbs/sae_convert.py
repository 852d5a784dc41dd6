"""`demur sae convert`: an SAE in the files of another library, read back and compared before it counts as written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from demur.errors import InputError
from demur.sae.base import Sae
from demur.sae.formats import saelens, sparsify
from demur.sae.meaning import SaeConfig
from demur.sae.store import load_sae, save_sae
from demur.verbs.config import SaeConvert

_TOKENS = 64
_SCALES = (0.1, 1.0, 10.0, 100.0)
"""Sizes of the random residuals, in units of b_dec and of the decoder's rows."""
_CLOSE = 1e-5
_TIES = 0.1
"""Share of tokens that may be left out because two latents are as large as each other but for rounding."""


@dataclass(frozen=True)
class Converted:
    """What `demur sae convert` wrote."""

    path: str
    to: str
    hash: str
    """Of the SAE as written; its old one is `hash_before`."""
    hash_before: str
    source: str
    """Where it came from."""
    architecture: str
    hookpoint: str
    difference: float
    """Largest difference of latents and reconstructions between both, relative to the largest value."""
    tokens: int
    """Random residuals behind it."""
    notes: tuple[str, ...]
    """What was lost, and what a user of the SAE must know."""


class Difference(NamedTuple):
    """How far two SAEs are apart."""

    largest: float
    """Of latents and reconstructions, relative to the largest value; infinite where pre-activations already differ."""
    tokens: int
    """Tokens compared."""


def sae_convert(config: SaeConvert) -> Converted:
    """Write `config.sae` for `config.to` in float32, read it back and compare.

    Raises as `load_sae`, and `InputError` when `out` holds something, when that library cannot hold this SAE, or when
    what was read back is not the same, in which case nothing stays in `out`.
    """
    existed = config.out.exists()
    if existed and (not config.out.is_dir() or any(config.out.iterdir())):
        raise InputError(f"{config.out} exists and is not empty; give a new folder")
    loaded = load_sae(config.sae, config.input_scale)
    write: dict[str, Callable[[Path, Sae, SaeConfig], tuple[str, ...]]]
    write = {"demur": _write_own, saelens.NAME: saelens.write, sparsify.NAME: sparsify.write}
    try:
        lost = write[config.to](config.out, loaded.sae, loaded.config)
        again = load_sae(config.out)
        apart = difference(loaded.sae, again.sae)
        if not apart.largest <= _CLOSE:
            raise InputError(
                f"{config.out} was read back with latents or reconstructions that differ by {apart.largest:.1e} of the "
                f"largest, expected at most {_CLOSE:.0e}, so it was removed; please report this SAE ({config.sae})"
            )
    except BaseException:
        for left in config.out.iterdir() if config.out.is_dir() else ():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if not existed and config.out.is_dir():
            config.out.rmdir()
        raise
    return Converted(
        path=str(config.out),
        to=config.to,
        hash=again.hash,
        hash_before=loaded.hash,
        source=loaded.config.source or config.sae,
        architecture=loaded.config.architecture,
        hookpoint=loaded.config.hookpoint,
        difference=apart.largest,
        tokens=apart.tokens,
        notes=(*lost, *loaded.config.notes),
    )


def _write_own(folder: Path, sae: Sae, config: SaeConfig) -> tuple[str, ...]:
    save_sae(folder, sae, config)
    return ()


def difference(one: Sae, other: Sae) -> Difference:
    """Compare two SAEs on random residuals of several sizes, around b_dec.

    A token on which they choose other latents, while all pre-activations agree, is a tie that rounding broke: it is
    left out, up to a tenth of the tokens.
    """
    generator = torch.Generator().manual_seed(0)
    largest, kept, seen = 0.0, 0, 0
    for scale in _SCALES:
        x = one.b_dec.detach() + scale * one.unit * torch.randn(_TOKENS, one.d_in, generator=generator)
        prepared = one.prepare(x), other.prepare(x)
        before, after = one.encode_prepared(prepared[0].x), other.encode_prepared(prepared[1].x)
        agree = _apart(one.preactivations(prepared[0].x), other.preactivations(prepared[1].x)) <= _CLOSE
        same = ((before > 0) == (after > 0)).all(-1)
        if not bool((agree | same).all()):
            return Difference(float("inf"), seen)
        kept, seen = kept + int(same.sum()), seen + _TOKENS
        decoded = prepared[0].restore(one.decode(before)), prepared[1].restore(other.decode(after))
        for a, b in ((before, after), decoded):
            largest = max(largest, float(_apart(a, b)[same].max()) if bool(same.any()) else 0.0)
    return Difference(largest if kept >= (1 - _TIES) * seen else float("inf"), kept)


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """[tokens] largest difference of each, relative to the largest value of all."""
    return (a - b).abs().amax(-1) / a.abs().max().clamp(min=1e-30)
