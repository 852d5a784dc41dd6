"""Which part of a text each token belongs to: the chat template, a system, user or assistant turn, or plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from demur.lm.chat import chat_ids, chat_text
from demur.lm.load import LanguageModel
from demur.types import Message

TYPES = ("template", "system", "user", "assistant", "text")
"""Token types; elsewhere a type is its index here. `text` is text outside any conversation."""
_TEMPLATE, _TEXT = TYPES.index("template"), TYPES.index("text")
# private-use characters: no template trims or looks for them
_MARK = "\ue000{}\ue001"
_MARKED = re.compile("\ue000(\\d+)\ue001")


class Typed(NamedTuple):
    """A text as a model reads it."""

    ids: list[int]
    """Token ids."""
    types: list[int]
    """One index into `TYPES` for each token."""


def typed_chat(lm: LanguageModel, messages: Sequence[Message], generation: bool = False) -> Typed:
    """`chat_ids` of the conversation, each token typed by the message whose content it writes.

    A token takes the type of most of its characters; a tie goes to the message. All else is `template`: markers,
    role names, a default system prompt. System text that the template or demur moves into a user turn is still
    `system`. A tokenizer that does not say which characters a token covers (a slow one) gives `text` throughout, which
    claims nothing. Raises as `chat_text` does.
    """
    if not lm.tokenizer.is_fast:
        ids = chat_ids(lm, messages, generation)
        return Typed(ids, [_TEXT] * len(ids))
    text = chat_text(lm, messages, generation)
    kinds = bytearray([_TEMPLATE]) * len(text)
    for message, start, end in _spans(lm, messages, generation, text):
        kinds[start:end] = bytes([TYPES.index(message.role)]) * (end - start)
    encoded = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return Typed(list(encoded["input_ids"]), [_majority(kinds[a:b]) for a, b in encoded["offset_mapping"]])


def typed_text(lm: LanguageModel, text: str) -> Typed:
    """Token ids of plain text: special tokens that the tokenizer adds are `template`, all else is `text`."""
    encoded = lm.tokenizer(text, add_special_tokens=True, return_special_tokens_mask=True)
    return Typed(list(encoded["input_ids"]), [_TEMPLATE if m else _TEXT for m in encoded["special_tokens_mask"]])


def _majority(kinds: bytearray) -> int:
    return max(set(kinds), key=lambda kind: (kinds.count(kind), kind)) if kinds else _TEMPLATE


def _spans(
    lm: LanguageModel, messages: Sequence[Message], generation: bool, text: str
) -> list[tuple[Message, int, int]]:
    """Where in `text` each message's content stands, as (message, start, end) in characters.

    The template is filled a second time with marks for contents, which shows what it writes between them: to search
    for a content alone would find the user turn `user` in its own header.
    """
    marked = chat_text(lm, [Message(m.role, _MARK.format(i)) for i, m in enumerate(messages)], generation)
    first, *rest = _MARKED.split(marked)
    if not text.startswith(first):
        return _searched(messages, text)
    found, place = [], len(first)
    for number, after in zip(rest[::2], rest[1::2], strict=True):
        message = messages[int(number)]
        for content in (message.content, message.content.strip()):
            end = place + len(content)
            if text.startswith(content, place) and text.startswith(after, end):
                break
        else:  # the template rewrote the content (some drop the thinking of earlier turns)
            end = text.find(after, place) if after else len(text)
            if end < 0:
                return _searched(messages, text)
        found.append((message, place, end))
        place = end + len(after)
    return found


def _searched(messages: Sequence[Message], text: str) -> list[tuple[Message, int, int]]:
    """The contents that are found, one after the other: for a template that writes other things around each."""
    found, place = [], 0
    for message in messages:
        content = message.content.strip()
        start = text.find(content, place)
        if content and start >= 0:
            place = start + len(content)
            found.append((message, start, place))
    return found
