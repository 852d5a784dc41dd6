"""Many prompts with a common beginning as one sequence, to be run on from a hookpoint again and again.

Prompts that share a system prompt are laid side by side after it, and after each prompt any number of answers, as a
tree: `[prefix | prompt 1 | answer | answer | prompt 2 | ...]`. A mask lets each token see what would stand before it
alone, and positions count so, which gives what the texts give one by one while nothing is run twice and nothing is
padding. Under many interventions at one hookpoint the residual there is the same: `pack` reads it once, `log_probs`
runs only the blocks above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from demur.errors import InputError
from demur.lm.batches import Row, shared_length
from demur.lm.load import LanguageModel
from demur.lm.record import Reading, read, resume
from demur.types import Hookpoint


class Text(NamedTuple):
    """A prompt and what may come after it."""

    prompt: Row
    """Token ids up to where the answer begins."""
    answers: tuple[Row, ...] = ()
    """Token ids of answers, or of how they begin."""


class Pack(NamedTuple):
    """Some texts as one sequence, read at a hookpoint."""

    texts: tuple[Text, ...]
    hookpoint: Hookpoint
    ids: Tensor
    """[1, width] token ids."""
    positions: Tensor
    """[1, width] each token's place in its own text."""
    mask: Tensor
    """[1, 1, width, width], added to attention scores: 0 where a token may look, very negative elsewhere."""
    reading: Reading
    """The residual [1, width, d_model] at the hookpoint."""
    text_of: Tensor
    """[width] which text each token is of; -1 for what all begin with."""
    columns: Tensor
    """[scored] tokens whose outputs are scored: of each text the last of its prompt, then those of its answers."""

    def of_answers(self, scored: Tensor) -> list[list[Tensor]]:
        """For each text and answer the part of `scored` [..., scored, v] that predicts the answer's tokens and what
        follows it: [..., length + 1, v]. For a text without answers its root alone, as one answer of no length."""
        found: list[list[Tensor]] = []
        at = 0
        for text in self.texts:
            root = scored[..., at : at + 1, :]
            at += 1
            parts = []
            for answer in text.answers:
                parts.append(torch.cat([root, scored[..., at : at + len(answer), :]], dim=-2))
                at += len(answer)
            found.append(parts or [root])
        return found


def pack(lm: LanguageModel, hookpoint: Hookpoint, texts: Sequence[Text]) -> Pack:
    """Lay `texts` out as one sequence and read it at `hookpoint`.

    Raises `InputError` for a text longer than the model's sliding window, or attention that takes no mask of its own.
    """
    if (kind := lm.model.config._attn_implementation) not in ("sdpa", "eager"):
        raise InputError(f"the model runs with {kind} attention, which takes no mask of ours; load it with sdpa")
    prompts = [text.prompt for text in texts]
    shared = shared_length(prompts) if len(texts) > 1 else 0
    ids = list(prompts[0][:shared])
    places = list(range(shared))
    text_of, branch_of = [-1] * shared, [-1] * shared
    columns: list[int] = []
    branches = 0
    for number, text in enumerate(texts):
        rest = text.prompt[shared:]
        ids += rest
        places += range(shared, len(text.prompt))
        text_of += [number] * len(rest)
        branch_of += [-1] * len(rest)
        columns.append(len(ids) - 1)
        for answer in text.answers:
            columns += range(len(ids), len(ids) + len(answer))
            ids += answer
            places += range(len(text.prompt), len(text.prompt) + len(answer))
            text_of += [number] * len(answer)
            branch_of += [branches] * len(answer)
            branches += 1
    window = getattr(lm.model.config.get_text_config(), "sliding_window", None)
    if window and max(places) >= window:
        raise InputError(
            f"a prompt with its answer has {max(places) + 1} tokens, but {lm.name} looks back {window} at most in some "
            "blocks; leave the longest prompts out"
        )
    device = lm.device
    of_text, of_branch = torch.tensor(text_of, device=device), torch.tensor(branch_of, device=device)
    order = torch.arange(len(ids), device=device)
    sees = (order[:, None] >= order) & ((of_text == -1) | (of_text[:, None] == of_text))
    sees &= (of_branch == -1) | (of_branch[:, None] == of_branch)
    mask = torch.zeros(sees.shape, dtype=lm.model.dtype, device=device)
    mask = mask.masked_fill(~sees, torch.finfo(lm.model.dtype).min)[None, None]
    tokens, positions = torch.tensor([ids], device=device), torch.tensor([places], device=device)
    reading = read(lm.model, hookpoint, tokens, mask, positions)
    scored = torch.tensor(columns, device=device)
    return Pack(tuple(texts), hookpoint, tokens, positions, mask, reading, of_text, scored)


def log_probs(lm: LanguageModel, packed: Pack, residual: Tensor) -> Tensor:
    """Log-probabilities [n, scored, vocab] (float32) at the scored columns when the hookpoint gives `residual`
    [n, width, d_model] in place of what was read. Gradients flow to `residual` if it wants them."""
    n = len(residual)
    with (
        torch.set_grad_enabled(residual.requires_grad),
        resume(lm.model, packed.hookpoint, Reading(residual, packed.reading.tuple_output)),
    ):
        logits = lm.model(
            input_ids=packed.ids.expand(n, -1),
            attention_mask=packed.mask,
            position_ids=packed.positions.expand(n, -1),
            use_cache=False,
            logits_to_keep=packed.columns,
        ).logits
    return torch.log_softmax(logits.float(), dim=-1)
