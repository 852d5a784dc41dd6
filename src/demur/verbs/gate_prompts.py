"""The prompts that a gate is trained and measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from demur.data.overlap import Held
from demur.data.prompts import prompts_hash, spread
from demur.data.suites import load_suite
from demur.errors import InputError
from demur.eval.probe_fit import Kind
from demur.types import Intent, Prompt
from demur.verbs.eval_config import named_limit
from demur.verbs.gate_config import GateConfig


class Example(NamedTuple):
    """A prompt to train on."""

    prompt: Prompt
    kind: Kind
    group: str
    """The same for a prompt and its twin, and for conversations that begin alike."""
    suite: str

    @property
    def later(self) -> bool:
        """Whether the assistant has spoken before."""
        return has_answer(self.prompt)


def has_answer(prompt: Prompt) -> bool:
    """Whether its last message is a later turn of a conversation."""
    return any(message.role == "assistant" for message in prompt.messages)


@dataclass(frozen=True)
class Source:
    """A suite that was trained on."""

    suite: str
    kind: Kind
    prompts: int
    hash: str
    left_out: int
    """Prompts that occur, or nearly, in a suite that is to be reported on."""


class Training(NamedTuple):
    """What to train on."""

    examples: list[Example]
    sources: list[Source]


def training_prompts(config: GateConfig) -> Training:
    """The prompts that `config` names, without what occurs in its held-out suites.

    Of a suite with a select split that split, of others all prompts. Raises as `load_suite` does, and `InputError` for
    a suite without a prompt of the wanted intent.
    """
    reported = _reported(config)
    held = Held(p.messages[-1].content for prompts in reported.values() for p in prompts)
    excluded = [load_suite(name, config.data_dir, otherwise="harmful") for name in config.exclude]  # whatever they are
    held_more = Held(p.messages[-1].content for prompts in excluded for p in prompts)
    examples: list[Example] = []
    sources: list[Source] = []
    seen: set[tuple[str, ...]] = set()
    wanted: list[tuple[Kind, Intent, Sequence[str]]] = [
        ("harmful", "harmful", config.harmful),
        ("lookalike", "benign", config.lookalike),
        ("benign", "benign", config.benign),
    ]
    for kind, intent, names in wanted:
        for given in names:
            name, limit = named_limit(given)
            prompts = load_suite(name, config.data_dir, otherwise=intent)
            prompts = [p for p in prompts if p.intent == intent]
            if not prompts:
                raise InputError(f"{name} has no {intent} prompts, but is to be trained on as {kind}; leave it out")
            chosen = [p for p in prompts if p.split == "select"] or prompts
            fresh = [p for p in chosen if _said(p) not in seen]
            kept = [p for p in fresh if p.messages[-1].content not in held and p.messages[-1].content not in held_more]
            left_out = len(fresh) - len(kept)
            kept = spread(kept, limit)
            seen |= {_said(p) for p in kept}
            examples += [Example(p, kind, p.twin or p.id, name) for p in kept]
            sources.append(Source(name, kind, len(kept), prompts_hash(kept), left_out))
    return Training(_grouped(examples), sources)


def _grouped(examples: Sequence[Example]) -> list[Example]:
    """Examples of groups that share the first message of a conversation put in one group."""
    leader: dict[str, str] = {}

    def of(name: str) -> str:
        while (above := leader.setdefault(name, name)) != name:
            name = above
        return name

    for one in examples:
        if one.later:
            said = next(message.content for message in one.prompt.messages if message.role == "user")
            leader[of(f"begins: {said}")] = of(one.group)
    return [one._replace(group=of(one.group)) for one in examples]


def _said(prompt: Prompt) -> tuple[str, ...]:
    """The conversation, by which a prompt that is there twice is known."""
    return tuple(message.content.strip().lower() for message in prompt.messages)


def reported_prompts(config: GateConfig) -> dict[tuple[str, Intent], list[Prompt]]:
    """By suite and intent, the test prompts to report on."""
    found: dict[tuple[str, Intent], list[Prompt]] = {}
    for name, prompts in _reported(config).items():
        for prompt in prompts:
            found.setdefault((name, prompt.intent), []).append(prompt)
    return found


def _reported(config: GateConfig) -> dict[str, list[Prompt]]:
    found = {}
    for given in config.report:
        name, limit = named_limit(given)
        # a file that does not say is measured as harmful; its name says what it is
        prompts = load_suite(name, config.data_dir, otherwise="harmful")
        found[Path(name).name] = spread([p for p in prompts if p.split == "test"], limit)
    return found
