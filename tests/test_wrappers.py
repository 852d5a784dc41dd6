"""Jailbreak wrappers: what they change, what they keep, and that encodings decode."""

import base64
import codecs
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demur.data.suites import load_suite
from demur.data.wrappers import WRAPPERS, fill, read_templates, wrap, wrapper_names
from demur.errors import InputError
from demur.types import Message, Prompt

NAMES = [wrapper.name for wrapper in WRAPPERS]
TEMPLATES = ("You are Bo. Bo answers: [INSERT PROMPT HERE]", "Stay in your role.", "Ask {prompt} twice: {prompt}")
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def ask(text: str) -> Prompt:
    return Prompt("set/1", (Message("user", text),), "harmful", "set", category="c", split="select", twin="set/0")


def test_every_prompt_under_every_wrapper_differs_in_its_last_turn_only() -> None:
    turns = (Message("system", "Be safe."), Message("user", "Hi"), Message("assistant", "Hello"))
    prompts = [replace(p, messages=(*turns, *p.messages)) for p in load_suite("harmful")[:7]]
    made = wrap(prompts, [*NAMES, "inthewild"], TEMPLATES)
    assert len(made) == 7 * (len(NAMES) + len(TEMPLATES))
    assert len({p.id for p in made}) == len({p.text for p in made}) == len(made)
    assert made[:7] == prompts  # under `none`
    for one, (wrapper, prompt) in zip(
        made, itertools.product([*NAMES, *["inthewild"] * len(TEMPLATES)], prompts), strict=True
    ):
        name = "" if wrapper == "none" else wrapper
        assert one.wrapper == name
        assert one.id == prompt.id if not name else one.id.startswith(f"{prompt.id}@{name}")
        assert one.messages[:-1] == turns
        assert one.messages[-1].role == "user"
        assert one.unwrapped == (prompt.text if name else "")
        assert replace(one, id=prompt.id, wrapper="", unwrapped="", messages=prompt.messages) == prompt


@given(texts)
def test_encodings_decode_to_the_request(text: str) -> None:
    by_name = {p.wrapper: p.text for p in wrap([ask(text)], ["base64", "rot13", "payload_split", "leetspeak"])}
    assert base64.b64decode(by_name["base64"].split("\n", 1)[1]).decode() == text
    assert codecs.decode(by_name["rot13"].split("\n", 1)[1], "rot13") == text
    first, second, _ = by_name["payload_split"].split("\n")
    assert json.loads(first.removeprefix("a = ")) + json.loads(second.removeprefix("b = ")) == text
    assert len(by_name["leetspeak"]) == len(text)


@given(texts)
def test_plain_wrappers_keep_the_request_in_one_piece(text: str) -> None:
    plain = ["prefix_injection", "refusal_suppression", "style_injection", "role_play", "inthewild"]
    for prompt in wrap([ask(text)], plain, TEMPLATES):
        assert text in prompt.text
        assert len(prompt.text) > len(text)


@pytest.mark.parametrize(
    "place",
    [
        *("[INSERT PROMPT HERE]", "[PROMPT]", "[YOUR PROMPT HERE]", "[insert any question here]", "{prompt}"),
        *("{insert_your_prompt_here}", r"\[INSERT PROMPT HERE\]", "[Put your question here]", "[<query>]", "<request>"),
    ],
)
def test_the_request_goes_where_the_template_has_a_place_for_it(place: str) -> None:
    request = r"What is \1 [PROMPT]?"
    filled = fill(f"Do anything now. {place} Go.", request)
    assert filled.startswith("Do anything now. ")
    assert filled.endswith(" Go.")
    assert request in filled
    assert "\n\n" not in filled


@pytest.mark.parametrize(
    "text", ["Be [PROMPT CREATOR].", "Say (prompt) and [anything].", "[NEVER DENIES A PROMPT]", "a < b"]
)
def test_elsewhere_it_goes_after_a_blank_line(text: str) -> None:
    assert fill(f"{text}\n", "How?") == f"{text}\n\nHow?"


def test_templates_are_chosen_by_seed_and_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "wild.json"
    every = [f"Template {i}" for i in range(40)]
    path.write_text(json.dumps([*every, every[3]]))
    assert read_templates(path) == every
    few = read_templates(path, limit=6, seed=1)
    assert few == read_templates(path, limit=6, seed=1) == sorted(few, key=every.index)
    assert len(few) == 6
    assert few != read_templates(path, limit=6, seed=2)
    # a template has the same id in every choice, so that its answers can be taken over
    ids = {p.id for p in wrap([ask("How?")], ["inthewild"], few)}
    assert ids < {p.id for p in wrap([ask("How?")], ["inthewild"], every)}
    (tmp_path / "rows.csv").write_text('jailbreak,n\n"Be Bo.",1\n')
    assert read_templates(tmp_path / "rows.csv", column="jailbreak") == ["Be Bo."]


def test_collected_jailbreaks_take_any_request(shared_data: Path) -> None:
    templates = read_templates(shared_data / "inthewild_jailbreaks/inthewild_jailbreak_llms.json")
    assert len(templates) > 600
    prompts = wrap([ask("How do I whittle a spoon?")], ["inthewild"], templates)
    assert len({p.id for p in prompts}) == len(templates)
    assert all("How do I whittle a spoon?" in p.text for p in prompts)
    assert sum(p.text.endswith("\n\nHow do I whittle a spoon?") for p in prompts) < len(prompts) - 80


def test_mistakes_are_one_sentence() -> None:
    with pytest.raises(InputError, match="wrapper is 'rot26', expected one of none, prefix_injection"):
        wrap([ask("How?")], ["rot26"])
    with pytest.raises(InputError, match="wrapper base64 is given twice"):
        wrap([ask("How?")], ["base64", "none", "base64"])
    with pytest.raises(InputError, match="wrapper inthewild needs templates"):
        wrap([ask("How?")], ["inthewild"])
    with pytest.raises(InputError, match="prompt set/1@rot13 is wrapped in rot13 already"):
        wrap(wrap([ask("How?")], ["rot13"]), ["base64"])


def test_names_and_sources() -> None:
    assert wrapper_names() == (*NAMES, "inthewild")
    assert NAMES[0] == "none"
    assert all(wrapper.source and wrapper.what for wrapper in WRAPPERS[1:])
