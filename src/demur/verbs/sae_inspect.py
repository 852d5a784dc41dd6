"""`demur sae inspect`: is this SAE read as it was meant? If not, which of the classic misreadings is it?

The SAE is measured as loaded, and then again as if one thing about it had been misread: the block, b_dec in the
input, the activation, the scale or normalisation, the BOS token. What then fits clearly better is named.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from demur import progress
from demur.errors import InputError, MismatchError
from demur.lm.batches import batches, pad
from demur.lm.chat import text_ids
from demur.lm.hookpoints import block_at, device_at
from demur.lm.load import LanguageModel, load
from demur.lm.record import read_all
from demur.lm.token_types import TYPES, Typed
from demur.sae.base import Normalize, Sae
from demur.sae.metrics import Meter, SaeMetrics, Tokens, measure
from demur.sae.store import LoadedSae, load_sae
from demur.sae.thresholded import JumpReluSae, ReluSae
from demur.sae.topk import TopKSae
from demur.types import Hookpoint, parse_hookpoint
from demur.verbs.config import SaeInspect
from demur.verbs.documents import some_rows
from demur.verbs.sae_eval import OWN_TEXT, Sieve, model_for, own_text, residuals, types_of

BAD_FVU = 0.5
"""Above it an SAE does not fit: published residual-stream SAEs leave 0.1 to 0.35 unexplained, a misread one near 1 or
more. A reading is proposed only if it stays below."""
BETTER = 0.75
"""Another reading is clearly better below this multiple of the FVU as loaded: neighbouring blocks and harmless
differences of text stay within it."""
NOTICED = 0.02
"""... and only if it explains this much more of the variance: below, ratios of small numbers mean nothing."""
CLOSE = 1.25
"""Readings of different kinds are all named if their FVU is within this multiple of the best: what merely dampens the
harm of the true misreading is not."""
_PROMPTS = 4
"""Of each of demur's own sets, under both system prompts: 24 conversations."""
_KS = (16, 32, 64, 128)
_ROWS = 4
"""Texts read at once: residuals of every block are held for them."""


@dataclass(frozen=True)
class Inspected:
    """What `demur sae inspect` found."""

    sae: str
    hash: str
    model: str
    hookpoint: str
    text: str
    fits: bool
    sentences: tuple[str, ...]
    """One that says it fits, or one for each problem."""
    metrics: dict[str, float | bool | None]
    """As loaded. `massive_share`: share of tokens with a massive norm, left out everywhere but in `fvu_with_massive`.
    `adds_bos`: whether the tokenizer puts a BOS token before plain text; None if it has none."""
    alternatives: dict[str, float]
    """FVU of every other reading."""


class _Reading(NamedTuple):
    """The SAE as if one thing about it had been misread."""

    kind: str
    name: str
    fvu: float
    advice: str
    """What to say if it fits better."""


def sae_inspect(config: SaeInspect) -> Inspected:
    """Measure the SAE as loaded and under every other reading. That it does not fit is a result, not an error.

    Raises as `load_sae` and `load` do, `MismatchError` when the model has another width, `InputError` when it is not
    known which model or block the SAE reads.
    """
    loaded = load_sae(config.sae)
    lm = load(model_for(loaded, config.model), device=config.device)
    if loaded.config.d_in != lm.d_model:
        raise MismatchError(
            f"the SAE {loaded.path!r} reads residuals of width {loaded.config.d_in}, but {lm.name} has width "
            f"{lm.d_model}; give the model of this SAE"
        )
    hookpoint = _hookpoint(loaded, config.hookpoint)
    block_at(lm.model, hookpoint)
    if config.data:
        rows = some_rows(lm, config.data, config.context, config.max_tokens, config.seed)
        text = ", ".join(path.name for path in config.data)
    else:
        rows, text = _first(own_text(lm, _PROMPTS), config.max_tokens), OWN_TEXT
    sae = loaded.sae.to(device_at(lm.model, hookpoint))
    blocks = _every_block(lm, hookpoint, rows, sae)
    metrics = blocks.metrics[hookpoint]
    readings = [
        *(
            _Reading("block", str(block), other.fvu, f"wrong layer: {block} fits better; give --hookpoint {block}")
            for block, other in blocks.metrics.items()
            if block != hookpoint
        ),
        *_other_b_dec(sae, blocks.ordinary),
        *_other_activations(sae, blocks.ordinary, metrics),
        *_other_scales(sae, blocks.ordinary),
        *_other_start(lm, hookpoint, sae, rows),
    ]
    problems = _problems(metrics.fvu, readings)
    where = f"{hookpoint} of {lm.name}"
    if problems:
        sentences = tuple(f"{p.advice} (FVU {p.fvu:.3g} instead of {metrics.fvu:.3g})" for p in problems)
    elif not metrics.fvu <= BAD_FVU:
        sentences = (
            f"does not fit {where}: FVU {metrics.fvu:.3g}, and no other block, b_dec, activation, scale or BOS fits "
            "better; it belongs to another model or place, or its weights are damaged",
        )
    else:
        sentences = (f"fits {where}: FVU {metrics.fvu:.3f} with {metrics.l0:.1f} active latents a token",)
    return Inspected(
        loaded.path,
        loaded.hash,
        lm.name,
        str(hookpoint),
        text,
        not problems and metrics.fvu <= BAD_FVU,
        sentences,
        {
            **metrics._asdict(),
            "massive_share": blocks.massive_share,
            "fvu_with_massive": measure(sae, blocks.every).metrics.fvu,
            "adds_bos": _adds_bos(lm),
        },
        {reading.name: reading.fvu for reading in readings},
    )


def _problems(fvu: float, readings: Sequence[_Reading]) -> list[_Reading]:
    """The best reading of each kind that is clearly better than `fvu`, best first, while close to the very best."""
    limit = min(BAD_FVU, BETTER * fvu, fvu - NOTICED) if math.isfinite(fvu) else BAD_FVU
    kinds: dict[str, _Reading] = {}
    for reading in sorted((r for r in readings if r.fvu < limit), key=lambda r: r.fvu):
        kinds.setdefault(reading.kind, reading)
    return [r for r in kinds.values() if r.fvu <= CLOSE * next(iter(kinds.values())).fvu]


def _hookpoint(loaded: LoadedSae, given: str) -> Hookpoint:
    if given:
        return parse_hookpoint(given)
    try:
        return parse_hookpoint(loaded.config.hookpoint)
    except InputError:
        raise InputError(
            f"the files of the SAE {loaded.path!r} name the place {loaded.config.hookpoint!r}, which is not the output "
            "of a block; give --hookpoint, for instance layers.12.resid_post"
        ) from None


def _first(rows: list[Typed], max_tokens: int) -> list[Typed]:
    total, kept = 0, []
    for row in rows:
        total += len(row.ids)
        if total <= max_tokens:
            kept.append(row)
    if not kept:
        raise InputError(f"max_tokens is {max_tokens}, less than one of demur's own texts takes; give more")
    return kept


class _Blocks(NamedTuple):
    metrics: dict[Hookpoint, SaeMetrics]
    """Of the SAE on each block's output, that block's massive tokens left out."""
    ordinary: list[Tokens]
    """At the hookpoint, massive tokens left out."""
    every: list[Tokens]
    massive_share: float


def _every_block(lm: LanguageModel, hookpoint: Hookpoint, rows: Sequence[Typed], sae: Sae) -> _Blocks:
    """One pass of the model over `rows`; residuals of blocks other than the hookpoint's are dropped batch by batch."""
    places = [Hookpoint(block) for block in range(lm.n_blocks)]
    meters, sieves = [Meter(sae) for _ in places], [Sieve() for _ in places]
    ordinary, every = [], []
    with progress.track("every block", len(rows), "texts") as advance:
        for batch in batches([len(row.ids) for row in rows], _ROWS):
            padded = pad(lm, [rows[i].ids for i in batch], side="right")
            types = types_of([rows[i] for i in batch])
            residuals = read_all(lm.model, padded.ids, padded.mask)
            for place, meter, sieve, residual in zip(places, meters, sieves, residuals, strict=True):
                tokens = Tokens(residual[padded.mask.bool().to(residual.device)].float(), types)
                kept = sieve(tokens)
                meter.add(kept)
                if place == hookpoint:
                    ordinary.append(kept)
                    every.append(tokens)
            advance(len(batch))
    metrics = {place: meter.result().metrics for place, meter in zip(places, meters, strict=True)}
    return _Blocks(metrics, ordinary, every, sieves[hookpoint.block].left_out)


def _other_b_dec(sae: Sae, tokens: Sequence[Tokens]) -> Iterator[_Reading]:
    other = copy.copy(sae)
    other.subtract_b_dec = not sae.subtract_b_dec
    name = f"b_dec {'subtracted' if other.subtract_b_dec else 'not subtracted'}"
    advice = f"b_dec misread: it fits better with {name} from the input before encoding"
    yield _Reading("b_dec", name, measure(other, tokens).metrics.fvu, advice)


def _other_activations(sae: Sae, tokens: Sequence[Tokens], metrics: SaeMetrics) -> Iterator[_Reading]:
    """Top-k of several k for a thresholded SAE that is far from sparse; ReLU for any other of the two families."""
    others: dict[str, Sae] = {}
    if isinstance(sae, JumpReluSae):
        # a misread top-k is active on half its latents or so; one that fits is nowhere near twice a fitting k
        others = {
            f"topk k={k}": TopKSae(sae.d_in, sae.d_sae, k, sae.normalize, sae.subtract_b_dec)
            for k in _KS
            if 2 * k < min(metrics.l0, sae.d_sae)
        }
    if isinstance(sae, TopKSae) or (isinstance(sae, JumpReluSae) and bool((sae.threshold > 0).any())):
        others["relu"] = ReluSae(sae.d_in, sae.d_sae, sae.normalize, sae.subtract_b_dec)
    for name, other in others.items():
        other.W_enc, other.b_enc, other.W_dec, other.b_dec = sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec
        if isinstance(other, ReluSae):
            other.threshold = torch.nn.Parameter(torch.zeros_like(sae.b_enc), requires_grad=False)
        advice = f"activation misread: it fits better as {name} than as {sae.kind} (L0 {metrics.l0:.0f})"
        yield _Reading("activation", name, measure(other, tokens).metrics.fvu, advice)


def _other_scales(sae: Sae, tokens: Sequence[Tokens]) -> Iterator[_Reading]:
    norm = float(torch.cat([part.x.norm(dim=-1) for part in tokens]).mean())
    factor = sae.d_in**0.5 / norm
    for name, times, problem in (
        ("scaled by sqrt(d)/mean|x|", factor, "a scale is missing"),
        ("scaled by mean|x|/sqrt(d)", 1 / factor, "a scale is applied twice"),
    ):
        # FVU does not care in which units it is taken
        fvu = measure(sae, [Tokens(part.x * times) for part in tokens]).metrics.fvu
        yield _Reading("scale", name, fvu, f"{problem}: it fits better on residuals multiplied by {times:.3g}")
    kinds: tuple[Normalize, ...] = ("none", "layer_norm", "constant_norm")
    for normalize in kinds:
        if normalize != sae.normalize:
            other = copy.copy(sae)
            other.normalize = normalize
            advice = f"normalisation misread: it fits better with normalize {normalize} than with {sae.normalize}"
            yield _Reading("scale", f"normalize {normalize}", measure(other, tokens).metrics.fvu, advice)


def _other_start(lm: LanguageModel, hookpoint: Hookpoint, sae: Sae, rows: Sequence[Typed]) -> Iterator[_Reading]:
    """The text with a BOS token where it has none, and without where it has one."""
    bos = lm.tokenizer.bos_token_id
    if bos is None:
        return
    if rows[0].ids[0] == bos:
        name = "without BOS"
        other = [Typed(row.ids[1:], row.types[1:]) if row.ids[0] == bos else row for row in rows]
        other = [row for row in other if row.ids]
    else:
        name, template = "with BOS", TYPES.index("template")
        other = [row if row.ids[0] == bos else Typed([bos, *row.ids], [template, *row.types]) for row in rows]
    fvu = measure(sae, residuals(lm, hookpoint, other, Sieve())).metrics.fvu
    yield _Reading("bos", name, fvu, f"BOS misread: it fits better on text {name}")


def _adds_bos(lm: LanguageModel) -> bool | None:
    bos = lm.tokenizer.bos_token_id
    return None if bos is None else text_ids(lm, "a", special=True)[:1] == [bos]
