"""Token types: every token belongs to the message it writes, under any chat template."""

from collections.abc import Iterator

import pytest
from tokenizers.processors import TemplateProcessing

from demur.lm.chat import chat_ids, text_ids
from demur.lm.load import LanguageModel, load
from demur.lm.token_types import TYPES, Typed, typed_chat, typed_text
from demur.testing import tiny_model
from demur.types import Message

TURNS = [
    Message("system", "system"),  # the words of the template itself
    Message("user", " user\n"),
    Message("assistant", "I'm sorry, but héllo 🎂."),
    Message("user", "assistant"),
]
OWN = None
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
)
SYSTEM_LAST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.last %}{{ messages[0]['content'] }}\n\n{% endif %}{{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}<|im_end|>{% endif %}{% endfor %}"
)
BY_LENGTH = (
    "{% for m in messages %}{{ m['content'] | length }}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}"
)
SHORTENS = "{% for m in messages %}<|im_start|>{{ m['content'].split('I')[-1] }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def lm() -> Iterator[LanguageModel]:
    made = tiny_model()
    template = made.tokenizer.chat_template
    yield made
    made.tokenizer.chat_template = template


def written(lm: LanguageModel, typed: Typed, kind: str) -> str:
    return str(lm.tokenizer.decode([i for i, t in zip(typed.ids, typed.types, strict=True) if TYPES[t] == kind]))


@pytest.mark.parametrize("template", [OWN, NO_SYSTEM, SYSTEM_LAST, BY_LENGTH])
@pytest.mark.parametrize("generation", [False, True])
def test_types_cover_the_contents_and_ids_are_those_of_chat_ids(
    lm: LanguageModel, template: str | None, generation: bool
) -> None:
    lm.tokenizer.chat_template = template or lm.tokenizer.chat_template
    typed = typed_chat(lm, TURNS, generation)
    assert typed.ids == chat_ids(lm, TURNS, generation)
    assert len(typed.types) == len(typed.ids)
    found = {kind: "".join(written(lm, typed, kind).split()) for kind in TYPES}
    if template == BY_LENGTH:  # what stands between contents cannot be known, so they are searched for
        assert found["assistant"] == "I'msorry,buthéllo🎂."
        return
    assert found["system"] == "system"
    assert found["user"] == "userassistant"
    assert found["assistant"] == "I'msorry,buthéllo🎂."
    assert found["text"] == ""
    assert found["template"]


def test_a_content_that_the_template_shortens_is_still_its_messages(lm: LanguageModel) -> None:
    lm.tokenizer.chat_template = SHORTENS
    typed = typed_chat(lm, TURNS)
    assert written(lm, typed, "assistant") == "'m sorry, but héllo 🎂."
    assert written(lm, typed, "user") == " user\nassistant"


def test_a_token_that_straddles_goes_where_most_of_its_characters_are(lm: LanguageModel) -> None:
    lm.tokenizer.chat_template = "{% for m in messages %}.{{ m['content'] }}.{% endfor %}"
    words = lm.tokenizer.backend_tokenizer
    words.add_tokens([".be", "afe.."])
    typed = typed_chat(lm, [Message("user", "be"), Message("assistant", "afe")])
    assert [(words.id_to_token(i), TYPES[t]) for i, t in zip(typed.ids, typed.types, strict=True)] == [
        (".be", "user"), (".", "template"), (".", "template"), ("a", "assistant"), ("f", "assistant"),
        ("e", "assistant"), (".", "template"),
    ]  # fmt: skip
    doubled = typed_chat(lm, [Message("user", "afe"), Message("assistant", "")])  # .afe.. : 3 of 5 are the user's
    assert [TYPES[t] for t in doubled.types][:2] == ["template", "user"]


def test_text_knows_the_special_tokens_that_the_tokenizer_adds(lm: LanguageModel) -> None:
    lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", pair="$A $B", special_tokens=[("<|im_start|>", 1)]
    )
    typed = typed_text(lm, "Hello there")
    assert typed.ids == text_ids(lm, "Hello there", special=True)
    assert [TYPES[t] for t in typed.types] == ["template", *["text"] * (len(typed.ids) - 1)]


def test_a_tokenizer_without_offsets_claims_nothing(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(lm.tokenizer), "is_fast", False)
    typed = typed_chat(lm, TURNS)
    assert typed.ids == chat_ids(lm, TURNS, generation=False)
    assert {TYPES[t] for t in typed.types} == {"text"}


@pytest.mark.real
def test_the_embedded_models_template() -> None:
    lm = load("smollm2-135m-instruct")
    typed = typed_chat(lm, TURNS, generation=True)
    assert typed.ids == chat_ids(lm, TURNS)
    assert written(lm, typed, "system") == "system"
    assert written(lm, typed, "user").split() == ["user", "assistant"]
    assert written(lm, typed, "assistant") == "I'm sorry, but héllo 🎂."
    plain = typed_chat(lm, TURNS[1:2])  # this template has a system prompt of its own
    assert written(lm, plain, "system") == ""
    assert written(lm, plain, "user").strip() == "user"
    assert "SmolLM" in written(lm, plain, "template")
