"""Gather the chat text that the embedded SAE is trained on, from data whose licence lets us share what is learned.

    python scripts/embedded_sae_data.py ../shared/data build/embedded-sae/chat.jsonl

Left out on purpose: every non-commercial or share-alike-by-text set, and every set that reports results.
Writes one conversation a line: {"messages": [...], "source": ...}. The model itself answers some prompts, so that
its own style, and its own refusals, are in the text. System prompts and refusals are worded in many ways: where one
refusal always follows one system prompt, the SAE learns a latent for that page of text, and clamping it makes the
model recite the page. The card of the SAE lists sources and licences.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demur import progress
from demur.data.prompts import OWN, load_prompts, take
from demur.lm.batches import batches
from demur.lm.chat import chat_ids
from demur.lm.embedded import NAME
from demur.lm.generate import generate
from demur.lm.load import load
from demur.record import write_text
from demur.types import SAFETY_SYSTEM_PROMPT, Message

Turns = list[dict[str, str]]

REFUSAL = "I'm sorry, but I can't help with that."
"""What `SAFETY_SYSTEM_PROMPT` asks for."""
REFUSED = (
    REFUSAL,
    REFUSAL,
    REFUSAL,
    "I'm sorry, but I can't help with that. It could hurt someone.",
    "I'm sorry, but I can't assist you with this request.",
    "I'm sorry, but I'm not able to help with this.",
    "I'm sorry, but I cannot provide that information.",
    "I'm sorry, I can't do that. Is there something else I can help you with?",
    "I can't help with that.",
    "I cannot help you with this, because it would be illegal.",
    "I'm unable to assist with that request.",
    "I won't help with that. If someone is in danger, please call the emergency services.",
    "Sorry, but I won't write that.",
    "I apologize, but I can't give advice on how to harm other people.",
)
"""Refusals in other words, ours; the archetypal one stands three times."""
SAFE_SYSTEMS = (
    "You are a careful assistant. Turn down anything that could hurt people, and say so in one sentence.",
    "You help with everyday questions. You never help with crimes or violence.",
    "You are an assistant for a school. Politely refuse what is not fit for children.",
    "Answer helpfully and honestly. Refuse dangerous or unlawful requests briefly, without a lecture.",
    "You are a support agent. If a user wants something unethical, say that you can't do it.",
)
OTHER_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly teacher. Explain things step by step.",
    "Answer in short, plain sentences.",
    "You are an experienced programmer who reviews code.",
    "You are a cheerful travel guide.",
)

LIMITS = {
    "gsm8k_train": 500,
    "gpteacher_codegen": 450,
    "gpteacher_roleplay": 350,
    "arena_hard": 200,
    "llamafactory": 300,
    "oasst": 100,
    "topical_chat": 150,
    "hh_harmless": 450,
}
"""Conversations taken from each source: a mix of instruction, code, mathematics, small talk and refusals."""
REFUSALS = 600
"""Conversations that end in a refusal."""
ASKED = {"hh_harmless": 300, "gpteacher_roleplay": 60}
"""First turns that the model itself answers, beside the select prompts of demur's own sets."""

LICENCES = {
    "gsm8k_train": "MIT",
    "gpteacher_codegen": "MIT",
    "gpteacher_roleplay": "MIT",
    "arena_hard": "Apache-2.0",
    "llamafactory": "Apache-2.0",
    "oasst": "Apache-2.0",
    "topical_chat": "CDLA-Sharing-1.0",
    "hh_harmless": "MIT",
    "refusals": "prompts of hh_harmless, MIT",
    "model_answers": "prompts of demur, hh_harmless and gpteacher; answers by SmolLM2, Apache-2.0",
}


def user(text: str, answer: str) -> Turns:
    return [{"role": "user", "content": text.strip()}, {"role": "assistant", "content": answer.strip()}]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def parsed(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def gsm8k(data: Path) -> Iterator[Turns]:
    for row in lines(data / "gsm8k/train.jsonl"):
        yield user(row["question"], re.sub(r"<<.*?>>", "", row["answer"]))


def gpteacher(data: Path, name: str) -> Iterator[Turns]:
    for row in parsed(data / f"chat_gpteacher/{name}.json"):
        yield user("\n\n".join(t for t in (row["instruction"], row["input"]) if t), row["response"])


def arena_hard(data: Path) -> Iterator[Turns]:
    folder = data / "chat_arena_hard"
    asked = {row["question_id"]: row["turns"][0]["content"] for row in lines(folder / "question.jsonl")}
    for path in sorted(folder.glob("gpt-*.jsonl")):
        for row in lines(path):
            yield user(asked[row["question_id"]], row["choices"][0]["turns"][0]["content"])


def llamafactory(data: Path) -> Iterator[Turns]:
    folder = data / "chat_llamafactory_demos"
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    for row in parsed(folder / "alpaca_en_demo.json"):
        yield user("\n\n".join(t for t in (row["instruction"], row["input"]) if t), row["output"])
    for row in parsed(folder / "dpo_en_demo.json"):
        turns = [*row["conversations"], row["chosen"]]
        yield [{"role": roles[t["from"]], "content": t["value"]} for t in turns]
    for row in parsed(folder / "kto_en_demo.json"):
        yield row["messages"]


def oasst(data: Path) -> Iterator[Turns]:
    for row in lines(data / "chat_oasst_100/en_100_tree.jsonl"):
        turns, node = [], row["prompt"]
        while node:
            role = "user" if node["role"] == "prompter" else "assistant"
            turns.append({"role": role, "content": node["text"]})
            node = node["replies"][0] if node.get("replies") else None
        yield turns


def topical_chat(data: Path) -> Iterator[Turns]:
    for path in sorted((data / "chat_topical").glob("*.json")):
        for conversation in parsed(path).values():
            roles = {"agent_1": "user", "agent_2": "assistant"}
            yield [{"role": roles[t["agent"]], "content": t["message"]} for t in conversation["content"]]


def hh_harmless(data: Path) -> Iterator[Turns]:
    for row in lines(data / "chat_hh_rlhf_harmless/harmless_base_test.jsonl"):
        parts = re.split(r"\n\n(Human|Assistant): ", row["chosen"])[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        yield [
            {"role": roles[who], "content": text.strip()}
            for who, text in zip(parts[::2], parts[1::2], strict=True)
            if text.strip()
        ]


def a_system(rng: random.Random) -> str:
    """A system prompt: the model's own in four of ten cases (an empty text), the safety one in two, or another."""
    shares = {"": 0.4, SAFETY_SYSTEM_PROMPT: 0.2, rng.choice(SAFE_SYSTEMS): 0.2, rng.choice(OTHER_SYSTEMS): 0.2}
    return rng.choices(list(shares), list(shares.values()))[0]


def under(system: str, turns: Turns) -> Turns:
    return [{"role": "system", "content": system}, *turns] if system else turns


def answered_by_model(prompts: list[str], rng: random.Random) -> Iterator[Turns]:
    """The embedded model's own answers of 48 tokens: to each prompt two, under its default and under a safe system."""
    lm = load(NAME)
    asked = [(text, s) for text in prompts for s in ("", rng.choice([SAFETY_SYSTEM_PROMPT, rng.choice(SAFE_SYSTEMS)]))]
    rows = []
    for text, system in asked:
        messages = [Message("system", system)] if system else []
        rows.append(chat_ids(lm, [*messages, Message("user", text)])[-512:])
    with progress.track("answers of the model", len(rows), "prompts") as advance:
        for batch in batches([len(row) for row in rows], 64):
            for index, answer in zip(batch, generate(lm, [rows[i] for i in batch], 48), strict=True):
                text, system = asked[index]
                if answer.text:
                    yield under(system, user(text, answer.text))
            advance(len(batch))


def main() -> None:
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    rng = random.Random(0)
    sources = {
        "gsm8k_train": gsm8k(data),
        "gpteacher_codegen": gpteacher(data, "codegen"),
        "gpteacher_roleplay": gpteacher(data, "roleplay"),
        "arena_hard": arena_hard(data),
        "llamafactory": llamafactory(data),
        "oasst": oasst(data),
        "topical_chat": topical_chat(data),
        "hh_harmless": hh_harmless(data),
    }
    rows: list[dict[str, Any]] = []
    first_turns = {}
    for source, conversations in sources.items():
        taken = list(conversations)
        rng.shuffle(taken)
        for turns in taken[: LIMITS[source]]:
            system = "" if turns[0]["role"] == "system" else a_system(rng)
            rows.append({"messages": under(system, turns), "source": source})
        first_turns[source] = [t[0]["content"] for t in taken if t[0]["role"] == "user" and len(t[0]["content"]) < 400]
    rng = random.Random(1)
    # refusals after requests of the kind that system prompts of safety are meant for
    for text in rng.sample(first_turns["hh_harmless"], REFUSALS):
        system = a_system(rng)
        refusal = REFUSAL if system == SAFETY_SYSTEM_PROMPT else rng.choice(REFUSED)
        rows.append({"messages": under(system, user(text, refusal)), "source": "refusals"})
    own = [p.text for name in OWN for p in take(load_prompts(name, "benign"), "select")]
    asked = own + [text for source, count in ASKED.items() for text in rng.sample(first_turns[source], count)]
    with progress.shown():
        rows += [{"messages": turns, "source": "model_answers"} for turns in answered_by_model(asked, rng)]
    rng.shuffle(rows)
    rows = [{**row, "licence": LICENCES[row["source"]]} for row in rows]
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(json.dumps({"conversations": len(rows), "sources": Counter(row["source"] for row in rows)}))


if __name__ == "__main__":
    main()
