"""Whose text each token is, against the character offsets of the conversation, for the marks of several templates."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from demur.errors import InputError
from demur.lm.turns import ASSISTANT, SYSTEM, TEMPLATE, USER, empty_memory, owners, read_turns
from demur.testing import tiny_tokenizer

LLAMA3 = (
    "<s>{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
GEMMA = (
    "<s>{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|turn|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}<|/turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}</s>{% else %}{{ raise_exception('no system') }}{% endif %}"
    "{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
MARKS = {
    "chatml": ("", []),
    "llama3": (LLAMA3, ["<s>", "<|head|>", "<|/head|>", "<|eot|>"]),
    "gemma": (GEMMA, ["<s>", "<|turn|>", "<|/turn|>"]),
    "phi": (PHI, ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"]),
}
TALK = [
    ("user", "What is blue?"),
    ("assistant", "The answer is: user\nassistant"),
    ("user", "I'm sorry\n\nbut why?"),
    ("assistant", "Hello there"),
]
OWNER = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    template, marks = MARKS[name]
    made = tiny_tokenizer()
    if template:
        made.add_special_tokens({"additional_special_tokens": marks})
        made.chat_template = template
    return made


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize("chunk", [999, 7, 1])
def test_owners_are_those_of_the_text_whole_and_in_pieces(name: str, chunk: int) -> None:
    made = tokenizer(name)
    talk = ([] if name in ("gemma", "mistral") else [("system", "Be kind.")]) + TALK
    text = made.apply_chat_template([{"role": r, "content": c} for r, c in talk], tokenize=False)
    encoded = made(text, add_special_tokens=False, return_offsets_mapping=True)
    wanted, at = [TEMPLATE] * len(encoded["input_ids"]), 0
    for role, content in talk:
        start = text.index(content, at)
        at = start + len(content)
        for place, (left, right) in enumerate(encoded["offset_mapping"]):
            if start <= left and right <= at:
                wanted[place] = OWNER[role]
    turns = read_turns(made)
    ids = torch.tensor([encoded["input_ids"]] * 2)
    memory = empty_memory(turns, 2, ids.device)
    found = []
    for piece in ids.split(chunk, dim=1):
        owner, memory = owners(turns, piece, memory)
        found.append(owner)
    assert torch.cat(found, dim=1).tolist() == [wanted] * 2


def test_turns_marked_by_ordinary_text_are_refused() -> None:
    made = tiny_tokenizer()
    made.chat_template = PLAIN
    with pytest.raises(InputError, match="marks turns with ordinary text"):
        read_turns(made)
    made.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        read_turns(made)
