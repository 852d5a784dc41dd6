"""Attach pure functions to hookpoints: they read or replace the residual while a `with` block runs.

Leaving the block removes every hook, also after an error, and the model is bit for bit what it was. Positions are
absolute: under a KV cache a forward pass sees one token, and `Step` says which one it is, of which row, and where
that row's prompt ends, so that an edit does the same with and without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from demur.errors import InputError
from demur.lm.caches import given_cache
from demur.lm.hookpoints import block_at
from demur.types import Hookpoint


class Step(NamedTuple):
    """Where in the text one forward pass is."""

    positions: Tensor
    """[batch, pos] int64: index of each token in its own row, padding not counted; -1 for padding."""
    prompt_lengths: Tensor
    """[batch] int64: tokens of each row that the caller gave; later ones were written by the model."""
    rows: Tensor
    """[batch] int64: which sequence each row is, the same throughout one call of `generate`. Longer than the batch
    where a row stands for several (a shared prefix): then those that are run come first."""
    origin: Tensor
    """Like `rows`: which row of the caller's batch it comes from; beams and samples of one row share it."""
    total: int
    """Sequences of the call; `rows` are below it."""
    given: int
    """Rows of the caller's batch; `origin` is below it."""
    beams: bool
    """Sequences are swapped between passes, so nothing that was remembered of one of them can be trusted."""
    fresh: bool
    """Nothing is in the cache: what was remembered of earlier passes is void."""
    ids: Tensor | None
    """[batch, pos] token ids; None where the model was given embeddings."""
    stands: Tensor | None = None
    """Which row of the batch stands for each of `rows`; None where each stands for itself."""

    def each(self, values: Tensor, dim: int = 0) -> Tensor:
        """`values` of the batch's rows along `dim`, one for each of `rows`."""
        return values if self.stands is None else values.index_select(dim, self.stands.to(values.device))


Edit = Callable[[Tensor, Step], Tensor]
"""Residual [batch, pos, d_model] and step to a NEW residual of the same shape; never in place."""


@dataclass
class Generation:
    """What is known about the rows of a call that runs the model several times."""

    batch: int
    """Rows that the caller gave."""
    lengths: Tensor | None = None
    """[batch] prompt lengths in tokens, where known."""
    columns: int = 0
    """Columns of the prompt, where lengths follow from the mask."""
    mask: Tensor | None = None
    """[batch, columns] the caller's mask, for passes that hide it (a static cache)."""
    rows: Tensor | None = None
    """Which of the rows are in the next pass; None for all."""
    stands: Tensor | None = None
    """As in `Step`."""
    beams: bool = False


@dataclass
class _Attached:
    """What demur keeps about a model while something is attached to it."""

    depth: int = 0
    generation: Generation | None = None
    remembered: Tensor | None = None
    """[batch] prompt lengths of a loop that the caller runs: the tokens of the last pass with an empty cache."""
    groupings: list[Sequence[int]] = field(default_factory=list)
    """Of what is attached: which rows of a batch it treats alike, as a number for each; empty for all of them."""


@dataclass
class _Pass:
    """The pass at hand, for what is attached together."""

    step: Step | None = None
    """None where the residual is left as it is."""
    about: Generation | None = None
    """The call that the last pass with a step belonged to."""
    batch: int = 0
    """Rows of that pass."""


_ATTACHED: WeakKeyDictionary[Any, _Attached] = WeakKeyDictionary()


@contextmanager
def attach(model: PreTrainedModel, hookpoint: Hookpoint, edit: Edit) -> Iterator[None]:
    """Replace the residual at `hookpoint` by `edit(residual, step)` inside the block.

    Edits attached later see what earlier ones returned. Raises `InputError` for a hookpoint outside the model.
    """
    with attach_all(model, {hookpoint: edit}):
        yield


@contextmanager
def attach_all(
    model: PreTrainedModel,
    edits: Mapping[Hookpoint, Edit],
    groups: Sequence[int] = (),
    rests: Callable[[Tensor | None], bool] = lambda ids: False,
) -> Iterator[None]:
    """`attach` at several hookpoints, which share one `Step` a pass.

    `groups`: a number for each row of a batch, the same for rows that are treated alike; empty where all are. What two
    rows have in common is computed once only within a group. `rests`: asked before a pass with which the rows of the
    last one go on, in the same call, and given its token ids; true where edits leave it as it is, and they are not run.
    """
    places = [(block_at(model, hookpoint), edit) for hookpoint, edit in edits.items()]
    with ExitStack() as stack:
        if places:
            known = stack.enter_context(_known(model))
            known.groupings.append(groups)
            stack.callback(known.groupings.remove, groups)
            current = _Pass()
            # a compiled model does not look whether hooks came or went, so it must be compiled anew (0.1 ms otherwise)
            torch.compiler.reset()
            stack.callback(torch.compiler.reset)
            before = partial(_before, known, current, rests)
            stack.callback(model.get_decoder().register_forward_pre_hook(before, with_kwargs=True).remove)
            for block, edit in places:
                stack.callback(block.register_forward_hook(partial(_after, current, edit)).remove)
        yield


def row_groups(model: PreTrainedModel, batch: int) -> list[int]:
    """For each row of a batch the first row that everything attached to `model` treats like it."""
    known = _ATTACHED.get(model)
    groupings = [groups for groups in known.groupings if groups] if known is not None else []
    if any(len(groups) != batch for groups in groupings):
        return list(range(batch))
    keys = list(zip(*groupings, strict=True)) if groupings else [()] * batch
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(key, row) for row, key in enumerate(keys)]


@contextmanager
def generation(model: PreTrainedModel, about: Generation) -> Iterator[Generation]:
    """Inside the block, passes of `model` belong to one call that `about` describes; it may be changed on the way."""
    known = _ATTACHED.setdefault(model, _Attached())
    before, known.generation = known.generation, about
    try:
        yield about
    finally:
        known.generation = before


@contextmanager
def prompt_lengths(model: PreTrainedModel, lengths: Tensor) -> Iterator[None]:
    """Inside the block, the first `lengths` [batch] tokens of each row are prompt and the rest counts as written."""
    with generation(model, Generation(len(lengths), lengths=lengths)):
        yield


@contextmanager
def _known(model: PreTrainedModel) -> Iterator[_Attached]:
    """What is kept about `model`; the outermost one makes the model's `generate` tell where the prompt ends."""
    known = _ATTACHED.setdefault(model, _Attached())
    outermost = known.depth == 0
    own = model.__dict__.get("generate")
    known.depth += 1
    if outermost:
        whole: Any = model  # not typed as assignable
        whole.generate = partial(_generate, model, known, whole.generate)
    try:
        yield known
    finally:
        known.depth -= 1
        if outermost:
            model.__dict__.pop("generate", None)
            if own is not None:
                model.__dict__["generate"] = own
            known.remembered = None


def _generate(model: Any, known: _Attached, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The model's own `generate`, with its prompt made known to what is attached."""
    if known.generation is not None:  # a call that has said it all
        return inner(*args, **kwargs)
    given = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else kwargs.get("inputs_embeds")))
    if given is None:
        return inner(*args, **kwargs)
    settings = kwargs.get("generation_config") or model.generation_config
    beams = kwargs.get("num_beams") or getattr(settings, "num_beams", None) or 1
    about = Generation(given.shape[0], columns=given.shape[1], mask=kwargs.get("attention_mask"), beams=beams > 1)
    with generation(model, about):
        return inner(*args, **kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _before(
    known: _Attached,
    current: _Pass,
    rests: Callable[[Tensor | None], bool],
    _module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    ids = kwargs.get("input_ids")
    if ids is None and args:
        ids = args[0]
    tokens = ids if ids is not None else kwargs["inputs_embeds"]
    cache = given_cache(kwargs)
    past = int(cache.get_seq_length()) if cache is not None else 0
    about = known.generation
    # rows of a call leave it, or come in by a pass with an empty cache; so as many as before are the same
    goes_on = about is not None and about is current.about and len(tokens) == current.batch and past > 0
    if goes_on and rests(ids):
        current.step = None
        return
    current.step = _step(known, ids, tokens, past, kwargs.get("attention_mask"))
    current.about, current.batch = about, len(tokens)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after(current: _Pass, edit: Edit, _module: Any, _args: Any, output: Any) -> Any:
    if current.step is None:
        return output
    residual = output[0] if isinstance(output, tuple) else output
    edited = edit(residual, current.step)
    return (edited, *output[1:]) if isinstance(output, tuple) else edited


def _step(known: _Attached, ids: Tensor | None, tokens: Tensor, past: int, mask: Any) -> Step:
    """The step of a call of the decoder with `tokens` (`ids`, or their embeddings) after `past` cached ones, from its
    `mask` and what is known about the call around it."""
    batch, length = tokens.shape[:2]
    about = known.generation
    mask = _mask(mask, about, batch, past + length)
    if mask is None:
        positions = torch.arange(past, past + length, device=tokens.device).expand(batch, length)
        counted = None
    else:
        counted = mask.long().cumsum(-1)
        positions = (counted - 1).masked_fill(mask == 0, -1)[:, past:]
    rows, origin, total = _rows(about, batch, tokens.device)
    given = about.batch if about is not None else batch
    if about is not None and about.lengths is not None:
        lengths = about.lengths.to(tokens.device)[origin[:batch]]
    elif about is not None and about.columns:
        # a prompt that comes in chunks has columns ahead, all of them text: padding is on its left
        ahead = max(0, about.columns - past - length)
        lengths = _count(counted, min(about.columns, past + length), batch, tokens.device) + ahead
    else:
        if past == 0 or known.remembered is None or len(known.remembered) != batch:
            known.remembered = _count(counted, past + length, batch, tokens.device)
        lengths = known.remembered
    return Step(
        positions,
        lengths,
        rows,
        origin,
        total,
        given,
        beams=about is not None and about.beams,
        fresh=past == 0,
        ids=ids,
        stands=about.stands if about is not None else None,
    )


def _count(counted: Tensor | None, columns: int, batch: int, device: torch.device) -> Tensor:
    """Tokens in the first `columns` columns of each row."""
    if counted is None:
        return torch.full((batch,), columns, dtype=torch.long, device=device)
    return counted[:, columns - 1]


def _mask(mask: Any, about: Generation | None, batch: int, width: int) -> Tensor | None:
    """One 0 or 1 for each of `width` tokens of a row, cached ones included; None where all are text."""
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == width):
        return mask
    if about is None or not about.columns:
        raise InputError(
            "the model was called with an attention mask that is not one 0 or 1 per token, so padding cannot be told "
            "from text; pass a 2-D attention_mask, or use the text-only class of the model"
        )
    if about.mask is None:
        return None
    given = about.mask.repeat_interleave(batch // about.batch, dim=0)
    return torch.nn.functional.pad(given, (0, width - given.shape[1]), value=1)


def _rows(about: Generation | None, batch: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Identity and origin of each row of the pass, and how many sequences there are."""
    if about is None:
        rows = torch.arange(batch, device=device)
        return rows, rows, batch
    if about.rows is not None:
        return about.rows, about.rows, about.batch
    rows = torch.arange(batch, device=device)
    if batch % about.batch:
        raise InputError(f"the model was called with {batch} rows inside a call for {about.batch}; expected a multiple")
    return rows, rows // (batch // about.batch), batch
