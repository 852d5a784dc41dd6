"""Who is attacked: a model that is loaded here, under each spec, or the names that an endpoint serves."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from demur.attacks.crescendo import Reply, Target
from demur.endpoint import Endpoint
from demur.lm.chat import chat_ids, with_system
from demur.lm.generate import generate
from demur.lm.load import LanguageModel
from demur.steering.steer import steer
from demur.text_gates import decide
from demur.types import Message, Prompt
from demur.verbs.attack_config import AttackConfig
from demur.verbs.sides import Sides, load_model, read_sides


class Attacked(NamedTuple):
    """The sides, and what answers for them."""

    sides: list[tuple[str, str]]
    """Label and spec hash of each, the base first; at an endpoint its name stands for both."""
    model: str
    """What identifies the target."""
    target: Target


def read_target(what: AttackConfig) -> Callable[[], Attacked]:
    """Checks what `what` names; the model is loaded when the result is called. Raises as `read_sides`, `Endpoint`."""
    if what.target_endpoint:
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        endpoints = {
            name: Endpoint(what.target_endpoint, name, key, 0.0, what.max_new_tokens, timeout=600)
            for name in what.target
        }
        sides = [(name, name) for name in what.target]
        return lambda: Attacked(sides, f"endpoint {what.target_endpoint}", _served(endpoints, what.system))
    read = read_sides(what)

    def loaded() -> Attacked:
        lm = load_model(what, read)
        named = [(one.label, one.spec.hash) for one in read.named]
        return Attacked(named, lm.identity, _local(lm, read, what))

    return loaded


def _served(endpoints: dict[str, Endpoint], system: str) -> Target:
    """Each conversation goes to the name that it is with; several at a time. Token counts are not told."""

    def reply(asked: Sequence[tuple[str, tuple[Message, ...]]]) -> list[Reply | None]:
        by_name: dict[str, list[int]] = defaultdict(list)
        for place, (name, _) in enumerate(asked):
            by_name[name].append(place)
        found: list[Reply | None] = [None] * len(asked)
        for name, places in by_name.items():
            prompts = [Prompt("", asked[place][1], "harmful", "attack") for place in places]
            texts = endpoints[name].say([with_system(prompt, system) for prompt in prompts])
            for place, text in zip(places, texts, strict=True):
                found[place] = Reply(text, 0, True)
        return found

    return reply


def _local(lm: LanguageModel, sides: Sides, what: AttackConfig) -> Target:
    """The model under each conversation's own spec, all in one batch; greedy."""
    specs = {one.spec.hash: one.spec for one in sides.named}

    def reply(asked: Sequence[tuple[str, tuple[Message, ...]]]) -> list[Reply | None]:
        rows = []
        for spec, messages in asked:
            prompt = Prompt("", messages, "harmful", "attack")
            rows.append(chat_ids(lm, with_system(prompt, specs[spec].system or what.system)))
        each = decide([specs[spec] for spec, _ in asked], [messages for _, messages in asked], lm.device)
        fit = [i for i, row in enumerate(rows) if lm.context is None or len(row) + what.max_new_tokens <= lm.context]
        found: list[Reply | None] = [None] * len(rows)
        if fit:
            with steer(lm, [each[i] for i in fit], sides.saes, directions=sides.directions):
                answers = generate(lm, [rows[i] for i in fit], what.max_new_tokens)
            for i, answer in zip(fit, answers, strict=True):
                found[i] = Reply(answer.text, len(answer.ids), answer.stop == "eos")
        return found

    return reply
