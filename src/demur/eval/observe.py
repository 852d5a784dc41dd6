"""One steered pass over given text, and what can be seen in it: KL, moves of the residual, how refusals begin.

Everything is teacher-forced. Which tokens are steered can be restricted beyond what a spec can say, by putting the
residual back where it should not move; so that "these tokens cause the damage" is a statement about an intervention.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from demur.features.openings import Openings
from demur.lm.attach import Step, attach, prompt_lengths
from demur.lm.batches import Padded, Row, pad
from demur.lm.chat import text_ids
from demur.lm.load import LanguageModel
from demur.lm.record import Reading
from demur.lm.score import log_probs_from, read_padded
from demur.lm.token_types import TYPES, typed_chat
from demur.sae.base import Sae
from demur.sae.store import LoadedSae
from demur.spec import SteeringSpec
from demur.steering.steer import steer
from demur.steering.vectors import Vector
from demur.types import Hookpoint, Message, parse_hookpoint

FIRST, ANSWER = "first", "answer"
"""Types besides those of `lm.token_types`: the first token of the row, an attention sink; and what the model wrote."""


@dataclass(frozen=True)
class Text:
    """A conversation with an answer, as the model reads it."""

    id: str
    ids: Row
    types: tuple[str, ...]
    """Of each token: `first`, `template`, `system`, `user`, `answer`, an earlier `assistant` turn, or `text` where the
    tokenizer does not say."""
    start: int
    """Where the answer starts: tokens of the prompt."""

    @property
    def body(self) -> int:
        """Where what differs from prompt to prompt starts: the first token of the user's."""
        return self.types.index("user") if "user" in self.types else 1


def typed_answer(lm: LanguageModel, name: str, messages: Sequence[Message], answer: Row | str) -> Text:
    """The conversation with `answer`, text or token ids, typed. Raises as `chat_text` does."""
    prompt = typed_chat(lm, messages, generation=True)
    said = text_ids(lm, answer) if isinstance(answer, str) else list(answer)
    types = [FIRST, *(TYPES[kind] for kind in prompt.types[1:]), *[ANSWER] * len(said)]
    return Text(name, [*prompt.ids, *said], tuple(types), len(prompt.ids))


@dataclass(frozen=True)
class Steered:
    """What is done to the model in a pass."""

    spec: SteeringSpec
    only: frozenset[str] | None = None
    """Types of tokens that may move; None: whatever the spec steers."""


@dataclass(frozen=True)
class Bench:
    """The model and what specs name by hash."""

    lm: LanguageModel
    hookpoint: Hookpoint
    """Below it nothing differs between specs."""
    saes: Mapping[str, Sae] | Sequence[LoadedSae]
    vectors: Sequence[Vector]


class Batch(NamedTuple):
    """Texts padded on the left, read up to the bench's hookpoint once for all specs."""

    texts: Sequence[Text]
    padded: Padded
    reading: Reading

    @property
    def width(self) -> int:
        """Columns."""
        return int(self.padded.ids.shape[1])

    def of(self, row: int, values: Tensor) -> Tensor:
        """Of `values` [batch, pos, ...] those of the tokens of text `row`."""
        return values[row, self.width - len(self.texts[row].ids) :]

    def mask(self, types: Collection[str]) -> Tensor:
        """[batch, pos, 1] bool: tokens of these types."""
        found = torch.zeros(len(self.texts), self.width, 1, dtype=torch.bool)
        for row, text in enumerate(self.texts):
            found[row, self.width - len(text.ids) :, 0] = torch.tensor([kind in types for kind in text.types])
        return found.to(self.padded.ids.device)


class Seen(NamedTuple):
    """What a pass gave."""

    log_probs: Tensor
    """[batch, last, vocab]: entry j predicts what follows the token in column `width - last + j`."""
    before: dict[str, Tensor]
    """[batch, pos, d_model] at each hookpoint that is edited, before the edits there."""
    after: dict[str, Tensor]
    """The same after them."""
    at: dict[str, Tensor]
    """The same at the places that were asked for, after any edits there."""


def read_batch(bench: Bench, texts: Sequence[Text]) -> Batch:
    """Run `texts` up to the bench's hookpoint."""
    padded = pad(bench.lm, [text.ids for text in texts], side="left")
    return Batch(texts, padded, read_padded(bench.lm, bench.hookpoint, padded))


def observe(bench: Bench, batch: Batch, steered: Steered, last: int, places: Iterable[Hookpoint] = ()) -> Seen:
    """One pass of `batch` under `steered`, with log-probabilities after the `last` columns and residuals at `places`,
    none of which lies below the bench's hookpoint."""
    model, spec = bench.lm.model, steered.spec
    edited = dict.fromkeys(parse_hookpoint(edit.hookpoint) for edit in spec.edits)
    may_move = None if steered.only is None else batch.mask(steered.only)
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    at: dict[str, Tensor] = {}

    def keep(where: dict[str, Tensor], place: Hookpoint) -> Callable[[Tensor, Step], Tensor]:
        def kept(residual: Tensor, step: Step) -> Tensor:
            where[str(place)] = residual
            return residual

        return kept

    def put_back(place: Hookpoint) -> Callable[[Tensor, Step], Tensor]:
        def moved(residual: Tensor, step: Step) -> Tensor:
            if may_move is not None:
                residual = torch.where(may_move.to(residual.device), residual, before[str(place)])
            after[str(place)] = residual
            return residual

        return moved

    ends = torch.tensor([text.start for text in batch.texts], device=bench.lm.device)
    with ExitStack() as stack:
        stack.enter_context(prompt_lengths(model, ends))
        for place in edited:
            stack.enter_context(attach(model, place, keep(before, place)))
        stack.enter_context(steer(bench.lm, spec, bench.saes, directions=bench.vectors))
        for place in edited:
            stack.enter_context(attach(model, place, put_back(place)))
        for place in places:
            stack.enter_context(attach(model, place, keep(at, place)))
        log_probs = log_probs_from(bench.lm, bench.hookpoint, batch.padded, batch.reading, last)
    return Seen(log_probs, before, after, at)


def kl_tokens(base: Tensor, steered: Tensor) -> Tensor:
    """KL(base || steered) in nats (float64) of each predicted token [...], of log-probabilities [..., vocab]."""
    kl = torch.nn.functional.kl_div(steered, base, reduction="none", log_target=True)
    return kl.sum(-1).double()


def log_odds(bench: Bench, prompts: Sequence[Text], specs: Sequence[Steered], openings: Openings) -> Tensor:
    """[specs, prompts] log-odds (float64) that the answer begins with one of `openings`; answers of `prompts` do not
    count."""
    scored: list[list[Tensor]] = [[] for _ in specs]
    for branch in openings.branches:
        texts = [
            Text(
                one.id, [*one.ids[: one.start], *branch], (*one.types[: one.start], *[ANSWER] * len(branch)), one.start
            )
            for one in prompts
        ]
        batch = read_batch(bench, texts)
        for number, steered in enumerate(specs):
            scored[number].append(observe(bench, batch, steered, len(branch) + 1).log_probs)
    return torch.stack([openings.log_odds(some).cpu() for some in scored])
