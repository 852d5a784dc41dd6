"""Conversations to token ids, through the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence

from demur.errors import InputError
from demur.lm.load import LanguageModel
from demur.types import Message, Prompt


def with_system(prompt: Prompt, system: str) -> tuple[Message, ...]:
    """The prompt's messages after `system`; the prompt's own system turn, if it has one, wins."""
    if not system or prompt.messages[0].role == "system":
        return prompt.messages
    return (Message("system", system), *prompt.messages)


def chat_text(lm: LanguageModel, messages: Sequence[Message], generation: bool = True) -> str:
    """The conversation as the model reads it, up to where its answer begins if `generation`.

    A template without a system role gets the system text at the head of the first user turn, as Gemma's authors
    advise. Raises `InputError` for a model without a chat template.
    """
    if not lm.tokenizer.chat_template:
        raise InputError(
            f"{lm.name} has no chat template; demur steers chat models: choose the instruct or chat version"
        )
    turns = [{"role": m.role, "content": m.content} for m in messages]

    def written(conversation: list[dict[str, str]]) -> str:
        return str(lm.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=generation))

    try:
        return written(turns)
    except Exception as error:  # templates raise jinja2's TemplateError, whatever they like inside it
        refusal = error
    if len(turns) > 1 and turns[0]["role"] == "system":
        merged = {"role": turns[1]["role"], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
        try:
            return written([merged, *turns[2:]])
        except Exception as error:
            refusal = error
    raise InputError(f"the chat template of {lm.name} refuses this conversation: {refusal}") from refusal


def chat_ids(lm: LanguageModel, messages: Sequence[Message], generation: bool = True) -> list[int]:
    """Token ids of `chat_text`; the template writes the special tokens, the tokenizer adds none."""
    ids: list[int] = lm.tokenizer(chat_text(lm, messages, generation), add_special_tokens=False).input_ids
    return ids


def text_ids(lm: LanguageModel, text: str, special: bool = False) -> list[int]:
    """Token ids of plain text, with the tokenizer's own special tokens if `special`."""
    ids: list[int] = lm.tokenizer(text, add_special_tokens=special).input_ids
    return ids
