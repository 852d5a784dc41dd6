"""Which tokens of a conversation are whose: user text, assistant text, system text, or the chat template's own.

What starts and ends a turn is read from the template itself, by writing a conversation with known words through it.
Reading is causal: the owner of a token depends on it and on earlier tokens only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from demur.errors import InputError

TEMPLATE, SYSTEM, USER, ASSISTANT = 0, 1, 2, 3
_ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}


class Turns(NamedTuple):
    """How a chat template marks turns."""

    headers: tuple[tuple[int, tuple[int, ...]], ...]
    """Owner and the token ids that stand right before its text."""
    ends: tuple[int, ...]
    """Special tokens that end a turn's text."""

    @property
    def longest(self) -> int:
        """Tokens of the longest header."""
        return max(len(ids) for _, ids in self.headers)


class Memory(NamedTuple):
    """What must be remembered of the tokens seen so far."""

    last: Tensor
    """[rows, longest - 1] token ids; -1 where there was none."""
    owner: Tensor
    """[rows] who would own the next token."""


def read_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """The turn marks of the tokenizer's chat template.

    Raises `InputError` where a turn is not marked by special tokens, because text could then look like a mark.
    """
    if not tokenizer.chat_template:
        raise InputError("the model has no chat template, so user and assistant turns cannot be told apart")
    words = ["ocean", "velvet", "copper", "meadow"]
    roles = ["user", "assistant", "user", "assistant"]
    turns = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
    found = dict(_gaps(tokenizer, turns))
    try:
        system = [{"role": "system", "content": "silver"}, *turns]
        found |= {"system": _gaps(tokenizer, system)[0][1]}
    except Exception:  # a template without a system role raises what it likes
        pass
    special = {int(i) for i in (*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values())}
    headers, ends = [], set()
    for role, gap in found.items():
        marks = [place for place, token in enumerate(gap) if token in special]
        if not marks or (role != "system" and marks[0] != 0):
            raise InputError(
                "the chat template marks turns with ordinary text, so they cannot be told from what a user writes; "
                "use positions all, prompt, generation or last_prompt_token"
            )
        if role != "system":
            ends.add(gap[0])
        # the turn before ends with the first mark; what follows it opens this one
        start = marks[1] if role != "system" and len(marks) > 1 else marks[0]
        headers.append((_ROLES[role], tuple(gap[start:])))
    return Turns(tuple(headers), tuple(sorted(ends)))


def _gaps(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> list[tuple[str, list[int]]]:
    """For each turn its role and the template's token ids between the text before it and its own text."""
    whole: Any = tokenizer  # transformers types what comes back loosely
    text = str(whole.apply_chat_template(turns, tokenize=False))
    encoded = whole(text, add_special_tokens=False, return_offsets_mapping=True)
    gaps, at = [], 0
    for turn in turns:
        start = text.index(turn["content"], at)
        gap = [
            token
            for token, (left, right) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if at <= left and right <= start and right > left
        ]
        gaps.append((turn["role"], gap))
        at = start + len(turn["content"])
    return gaps


def empty_memory(turns: Turns, rows: int, device: torch.device) -> Memory:
    """Before the first token."""
    return Memory(
        torch.full((rows, turns.longest - 1), -1, dtype=torch.long, device=device),
        torch.full((rows,), TEMPLATE, dtype=torch.long, device=device),
    )


def owners(turns: Turns, ids: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """Owner [rows, pos] of each token of `ids` [rows, pos], and what to remember for the tokens that follow."""
    seen = torch.cat([memory.last, ids], dim=1)
    length = ids.shape[1]
    # what each token makes the owner of the next one: -1 leaves it as it is
    change = torch.full_like(ids, -1)
    for end in turns.ends:
        change = change.masked_fill(ids == end, TEMPLATE)
    for whose, header in turns.headers:
        match = torch.ones_like(ids, dtype=torch.bool)
        for back, token in enumerate(reversed(header)):
            first = turns.longest - 1 - back
            match &= seen[:, first : first + length] == token
        change = change.masked_fill(match, whose)
    places = torch.arange(length, device=ids.device).expand_as(ids)
    latest = torch.where(change >= 0, places, -1).cummax(dim=1).values
    after = torch.where(latest >= 0, change.gather(1, latest.clamp(min=0)), memory.owner.unsqueeze(1))
    before = torch.cat([memory.owner.unsqueeze(1), after[:, :-1]], dim=1)
    ending = torch.isin(ids, torch.tensor(turns.ends, device=ids.device))
    owner = torch.where(ending, TEMPLATE, before)
    keep = turns.longest - 1
    return owner, Memory(seen[:, seen.shape[1] - keep :], after[:, -1])
