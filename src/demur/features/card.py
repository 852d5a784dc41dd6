"""A latent's card: on which text it is active, what its decoder row says, which latents are like it.

Where a latent is active shows what it reads, the logit lens what it writes straight to the output. Neither shows what
it does to the model: that is the curve, which the caller measures (`demur.verbs.latent`) and passes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from demur import progress
from demur.errors import InputError
from demur.lm.batches import batches, pad
from demur.lm.harvest import norm_limits
from demur.lm.lens import logit_lens
from demur.lm.load import LanguageModel
from demur.lm.record import read
from demur.lm.token_types import TYPES, Typed
from demur.sae.base import Sae
from demur.sae.store import LoadedSae
from demur.types import CurvePoint, Example, FeatureCard, Firing, Hookpoint, Neighbour, TokenLogit

CONTEXT = 20
"""Tokens shown on each side of an example's peak."""
BINS = 20
"""Of the histogram of activations."""
_QUANTILES = (0.75, 0.5, 0.25)
_TOKENS, _NEIGHBOURS = 15, 10
_BATCH_TOKENS = 2048
_FOR_LIMIT = 64
"""Rows whose median norm says which norms are massive."""
_SPELLING = 4
"""Tokens that may spell one character: UTF-8 takes four bytes at most."""


class Text(NamedTuple):
    """Reference text."""

    rows: Sequence[Typed]
    documents: Sequence[int]
    """Which document each row is from."""
    name: str
    """What it is, in words."""


class Curve(NamedTuple):
    """What clamping a latent does."""

    points: tuple[CurvePoint, ...]
    harmful: int
    """Harmful prompts behind each point."""
    benign: int
    """Benign prompts behind each point."""


class Activations(NamedTuple):
    """Chosen latents on all tokens of a text, rows one after the other."""

    values: Tensor
    """[tokens, latents] float32, on the CPU; 0 on tokens that are not looked at."""
    kept: Tensor
    """[tokens] bool: looked at."""


class _Place(NamedTuple):
    """A token on which a latent is active."""

    row: int
    token: int
    value: float


def cards(
    lm: LanguageModel,
    loaded: LoadedSae,
    hookpoint: Hookpoint,
    text: Text,
    latents: Sequence[int],
    examples: int = 12,
    curves: Mapping[int, Curve] | None = None,
    notes: Sequence[str] = (),
) -> list[FeatureCard]:
    """A card for each of `latents`, from one pass over `text`; the SAE is where its block runs.

    Raises as `activations` and `logit_lens`.
    """
    seen = activations(lm, loaded.sae, hookpoint, text.rows, latents)
    rows = loaded.sae.W_dec.detach()[list(latents)]
    lens = logit_lens(lm, rows)[:, : len(lm.tokenizer)].cpu()
    none = Curve((), 0, 0)
    made = []
    for column, latent in enumerate(latents):
        values = seen.values[:, column]
        active = values[values > 0]
        largest = float(active.max()) if len(active) else 0.0
        curve = (curves or {}).get(latent, none)
        top, middle = _examples(lm, text, values, examples)
        made.append(
            FeatureCard(
                latent=latent,
                model=lm.identity,
                sae=f"{loaded.path} ({loaded.hash})",
                hookpoint=str(hookpoint),
                text=text.name,
                documents=len(set(text.documents)),
                tokens=int(seen.kept.sum()),
                left_out=int((~seen.kept).sum()),
                active=len(active),
                max_activation=largest,
                mean_activation=float(active.double().mean()) if len(active) else 0.0,
                firing=_firing(text.rows, values, seen.kept),
                histogram=tuple(int(n) for n in torch.histc(active, BINS, 0, largest or 1.0).tolist()),
                examples=top,
                middle=middle,
                promoted=_extreme(lm, lens[column], largest=True),
                suppressed=_extreme(lm, lens[column], largest=False),
                neighbours=neighbours(loaded.sae, latent),
                curve=curve.points,
                curve_harmful=curve.harmful,
                curve_benign=curve.benign,
                notes=(*notes, *([] if len(active) else ["This latent is active on no token of the text."])),
            )
        )
    return made


def activations(
    lm: LanguageModel, sae: Sae, hookpoint: Hookpoint, rows: Sequence[Typed], latents: Sequence[int]
) -> Activations:
    """`latents` on every token of `rows`, exactly as the SAE encodes them.

    Left out are the first token of each row and those with a massive norm: no SAE is trained on them. Memory: a batch,
    and 4 bytes for each token and latent. Raises `InputError` where that leaves no token, as with NaN.
    """
    limit = norm_limits(lm, [hookpoint], rows[:_FOR_LIMIT])[str(hookpoint)]
    lengths = [len(row.ids) for row in rows]
    values, kept = ([torch.empty(0)] * len(rows) for _ in range(2))
    reader = sae.reader(latents)
    with progress.track("activations", len(rows), "texts") as advance, torch.no_grad():
        for batch in batches(lengths, max(1, _BATCH_TOKENS // max(lengths))):
            padded = pad(lm, [rows[i].ids for i in batch], side="right")
            residual = read(lm.model, hookpoint, padded.ids, padded.mask).residual.float()
            looked_at = padded.mask.bool().to(residual.device) & (residual.norm(dim=-1) <= limit)
            looked_at[:, 0] = False
            x = sae.prepare(residual[looked_at]).x
            found = x.new_zeros(*looked_at.shape, len(latents))
            found[looked_at] = reader(x, torch.ones(len(x), len(latents), dtype=torch.bool, device=x.device))
            for i, one, which in zip(batch, found.float().cpu(), looked_at.cpu(), strict=True):
                values[i], kept[i] = one[: lengths[i]], which[: lengths[i]]
            advance(len(batch))
    seen = Activations(torch.cat(values), torch.cat(kept))
    if not bool(seen.kept.any()):
        raise InputError(
            f"no token of the text can be looked at: {lm.name} gives NaN at {hookpoint} in {lm.model.dtype}, or every "
            "row is a single token; load the model in bfloat16 or float32, or give more text"
        )
    return seen


def pieces(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """What each of `ids` adds to the decoded text, so that all of them together are the text.

    A token that ends inside a character adds nothing; the one that completes the character has it whole.
    """
    found: list[str] = []
    done = ""
    for end in range(1, len(ids) + 1):
        so_far = decode(ids[:end])
        whole = end == len(ids) or not so_far.endswith("\ufffd")
        grows = so_far.startswith(done)  # some tokenizers tidy up what stands before
        found.append(so_far[len(done) :] if whole and grows else "")
        done = so_far if whole and grows else done
    return found


def neighbours(sae: Sae, latent: int, count: int = _NEIGHBOURS) -> tuple[Neighbour, ...]:
    """The `count` other latents whose decoder rows have the largest cosine with that of `latent`."""
    rows = sae.W_dec.detach().float()
    cosines = F.cosine_similarity(rows, rows[latent : latent + 1])
    cosines[latent] = -torch.inf
    found = cosines.topk(min(count, len(rows) - 1))
    columns = sae.W_enc.detach().float()
    encoder = F.cosine_similarity(columns[:, found.indices], columns[:, latent : latent + 1], dim=0)
    both = zip(found.indices.tolist(), found.values.tolist(), encoder.tolist(), strict=True)
    return tuple(Neighbour(*one) for one in both)


def _firing(rows: Sequence[Typed], values: Tensor, kept: Tensor) -> tuple[Firing, ...]:
    types = torch.tensor([kind for row in rows for kind in row.types])
    tokens = torch.bincount(types[kept], minlength=len(TYPES)).tolist()
    active = torch.bincount(types[values > 0], minlength=len(TYPES)).tolist()
    return tuple(Firing(name, n, k) for name, n, k in zip(TYPES, tokens, active, strict=True) if n)


def _examples(
    lm: LanguageModel, text: Text, values: Tensor, count: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The `count` strongest, and those at `_QUANTILES`, for the activations `values` [tokens] of one latent."""
    by_row = values.split([len(row.ids) for row in text.rows])
    ranked = _ranked(by_row)
    said: set[tuple[int, ...]] = set()
    top = _differing(text, ranked, count, said)
    middle = []
    for quantile in _QUANTILES:
        middle += _differing(text, _nearest(ranked, round((1 - quantile) * (len(ranked) - 1))), 1, said)

    def shown(places: Sequence[_Place]) -> tuple[Example, ...]:
        no_more = [sum(one.value <= place.value for one in ranked) / len(ranked) for place in places]
        rows = [by_row[place.row].tolist() for place in places]
        return tuple(_example(lm, text, *one) for one in zip(places, rows, no_more, strict=True))

    return shown(top), shown(middle)


def _ranked(by_row: Sequence[Tensor]) -> list[_Place]:
    """All tokens on which the latent is active, strongest first, the earlier first among equals."""
    places = [
        _Place(number, token, float(row[token]))
        for number, row in enumerate(by_row)
        for token in row.nonzero().flatten().tolist()
    ]
    return sorted(places, key=lambda place: -place.value)


def _nearest(ranked: Sequence[_Place], rank: int) -> list[_Place]:
    return [ranked[i] for i in sorted(range(len(ranked)), key=lambda i: abs(i - rank))]


def _differing(text: Text, ranked: Sequence[_Place], count: int, said: set[tuple[int, ...]]) -> list[_Place]:
    """The first `count` of `ranked` that are from different documents and differ in the token and the shown text before
    it, as the template's text is the same in every conversation. `said`: such texts, which grow by those found."""
    found: list[_Place] = []
    used: set[int] = set()
    for place in ranked:
        if len(found) == count:
            break
        before = tuple(text.rows[place.row].ids[max(0, place.token - CONTEXT) : place.token + 1])
        document = text.documents[place.row]
        if document not in used and before not in said:
            found.append(place)
            used.add(document)
            said.add(before)
    return found


def _example(lm: LanguageModel, text: Text, place: _Place, values: Sequence[float], quantile: float) -> Example:
    ids, types = text.rows[place.row]
    start, end = max(0, place.token - CONTEXT), min(len(ids), place.token + CONTEXT + 1)
    # with the tokens around it, so that no character is cut where the window begins or ends
    first = max(0, start - _SPELLING)
    written = pieces(lambda some: decode(lm, some), ids[first : end + _SPELLING])
    return Example(
        document=text.documents[place.row],
        tokens=tuple(written[start - first : end - first]),
        activations=tuple(values[start:end]),
        peak=place.token - start,
        type=TYPES[types[place.token]],
        quantile=quantile,
    )


def _extreme(lm: LanguageModel, logits: Tensor, largest: bool) -> tuple[TokenLogit, ...]:
    centred = logits - logits.mean()
    found = centred.topk(min(_TOKENS, len(centred)), largest=largest)
    return tuple(
        TokenLogit(i, _token(lm, i), logit)
        for i, logit in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    )


def _token(lm: LanguageModel, token: int) -> str:
    """A token by itself as text; as the vocabulary spells it where it is only a part of a character."""
    text = decode(lm, [token])
    return text if text and "\ufffd" not in text else str(lm.tokenizer.convert_ids_to_tokens(token))


def decode(lm: LanguageModel, ids: Sequence[int]) -> str:
    """`ids` as text, special tokens included, nothing tidied up."""
    return str(lm.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
