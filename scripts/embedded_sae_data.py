"""Gather the chat text that the embedded SAE is trained on, from data whose licence lets us share what is learned.

    python scripts/embedded_sae_data.py ../shared/data build/embedded-sae/chat.jsonl

Left out on purpose: every non-commercial or share-alike-by-text set, and every set that reports results.
Writes one conversation a line: {"messages": [...], "source": ...}. The model itself answers some prompts, so that
its own style, and its own refusals, are in the text. The card of the SAE lists sources and licences.
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

REFUSAL = "I'm sorry, but I can't help with that."
Turns = list[dict[str, str]]

LIMITS = {
    "gsm8k_train": 500,
    "gpteacher_codegen": 450,
    "gpteacher_roleplay": 350,
    "arena_hard": 200,
    "llamafactory": 300,
    "oasst": 100,
    "topical_chat": 150,
    "hh_harmless": 450,
    "coconot": 300,
}
"""Conversations taken from each source: a mix of instruction, code, mathematics, small talk and refusals."""
REFUSALS = 600
"""Conversations that end in the refusal that the safety system prompt asks for."""
ASKED = {"hh_harmless": 180, "gpteacher_roleplay": 60, "coconot": 60}
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
    "coconot": "ODC-BY",
    "refusals": "prompts of hh_harmless, MIT",
    "model_answers": "prompts of demur, hh_harmless, gpteacher and coconot; answers by SmolLM2, Apache-2.0",
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


def coconot(data: Path) -> Iterator[Turns]:
    for row in lines(data / "coconot/coconot_pref.jsonl"):
        yield user(row["prompt"], row["rejected"])
        yield user(row["prompt"], row["chosen"])


def answered_by_model(prompts: list[str]) -> Iterator[Turns]:
    """The embedded model's own answers of 48 tokens, under its default and under the safety system prompt."""
    lm = load(NAME)
    asked = [(text, system) for text in prompts for system in ("", SAFETY_SYSTEM_PROMPT)]
    rows = []
    for text, system in asked:
        messages = [Message("system", system)] if system else []
        rows.append(chat_ids(lm, [*messages, Message("user", text)])[-512:])
    with progress.track("answers of the model", len(rows), "prompts") as advance:
        for batch in batches([len(row) for row in rows], 64):
            for index, answer in zip(batch, generate(lm, [rows[i] for i in batch], 48), strict=True):
                text, system = asked[index]
                if answer.text:
                    turns = [{"role": "system", "content": system}] if system else []
                    yield turns + user(text, answer.text)
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
        "coconot": coconot(data),
    }
    rows: list[dict[str, Any]] = []
    first_turns = {}
    for source, conversations in sources.items():
        taken = list(conversations)
        rng.shuffle(taken)
        for turns in taken[: LIMITS[source]]:
            if turns[0]["role"] != "system" and rng.random() < 0.5:
                turns = [{"role": "system", "content": SAFETY_SYSTEM_PROMPT}, *turns]
            rows.append({"messages": turns, "source": source})
        first_turns[source] = [t[0]["content"] for t in taken if t[0]["role"] == "user" and len(t[0]["content"]) < 400]
    rng = random.Random(1)
    # what the safety system prompt asks for, after requests of the kind it is meant for
    for text in rng.sample(first_turns["hh_harmless"], REFUSALS):
        turns = [{"role": "system", "content": SAFETY_SYSTEM_PROMPT}, *user(text, REFUSAL)]
        rows.append({"messages": turns, "source": "refusals"})
    own = [p.text for name in OWN for p in take(load_prompts(name, "benign"), "select")]
    asked = own + [text for source, count in ASKED.items() for text in rng.sample(first_turns[source], count)]
    with progress.shown():
        rows += [{"messages": turns, "source": "model_answers"} for turns in answered_by_model(asked)]
    rng.shuffle(rows)
    rows = [{**row, "licence": LICENCES[row["source"]]} for row in rows]
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(json.dumps({"conversations": len(rows), "sources": Counter(row["source"] for row in rows)}))


if __name__ == "__main__":
    main()
