"""How much faster `demur serve` answers 16 streams at once than the same 16 in turn, and whether they say the same.

    python benchmarks/serving.py [--json] [--streams 16] [--tokens 64] [--repeats 3]

A real server in a process of its own on the embedded model, asked with the official client: each answer under one of
eight specs (clamps of latent 957 and 3), greedily. One round in turn and one at once alternate; the median of each
counts. Needs `demur[serve]` and `demur[endpoint]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai

from demur.data.prompts import load_prompts
from demur.record import to_json, write_json
from demur.sae.store import load_sae
from demur.spec import Edit, SteeringSpec
from demur.types import UNSTEERED

SPECS = [(957, 2), (957, 4), (957, 6), (957, 8), (957, 10), (957, 12), (3, 8)]


def specs(folder: Path) -> list[str]:
    """Write the specs; their names, and `unsteered`."""
    sae = load_sae("smollm2-135m-instruct")
    for latent, value in SPECS:
        spec = SteeringSpec((Edit(sae.config.hookpoint, sae.hash, (latent,), value),))
        write_json(folder / f"{latent}-at-{value}.json", to_json(spec))
    return [UNSTEERED, *(f"{latent}-at-{value}" for latent, value in SPECS)]


async def ask(client: openai.AsyncOpenAI, text: str, spec: str, tokens: int) -> tuple[str, int, float]:
    """The streamed answer under a spec, which is a model name here; its tokens; seconds to the first of them."""
    start = time.perf_counter()
    first = 0.0
    said, written = [], 0
    stream: Any = await client.chat.completions.create(
        model=spec,
        messages=[{"role": "user", "content": text}],
        temperature=0,
        max_completion_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        first = first or time.perf_counter() - start
        if chunk.choices:
            said.append(chunk.choices[0].delta.content or "")
        if chunk.usage:
            written = chunk.usage.completion_tokens
    return "".join(said), written, first


async def measure(address: str, asked: list[tuple[str, str]], tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens a second in turn and at once."""
    rates: dict[str, list[float]] = {"in_turn": [], "at_once": []}
    firsts: dict[str, list[float]] = {"in_turn": [], "at_once": []}
    texts: dict[str, list[str]] = {}
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600) as client:
        model = (await client.models.list()).data[0].id
        asked = [(text, model if spec == UNSTEERED else spec) for text, spec in asked]
        await ask(client, "Hello", model, 4)
        for _ in range(repeats):
            for way in rates:
                start = time.perf_counter()
                if way == "in_turn":
                    found = [await ask(client, text, spec, tokens) for text, spec in asked]
                else:
                    found = await asyncio.gather(*(ask(client, text, spec, tokens) for text, spec in asked))
                rates[way].append(sum(written for _, written, _ in found) / (time.perf_counter() - start))
                firsts[way] += [first for _, _, first in found]
                texts[way] = [text for text, _, _ in found]
    turn, once = (statistics.median(rates[way]) for way in rates)
    return {
        "serve_speedup": round(once / turn, 2),
        "tokens_per_second_in_turn": round(turn, 1),
        "tokens_per_second_at_once": round(once, 1),
        "first_token_seconds": {way: round(statistics.median(values), 3) for way, values in firsts.items()},
        "same_texts": sum(a == b for a, b in zip(texts["in_turn"], texts["at_once"], strict=True)),
        "streams": len(asked),
        "tokens": tokens,
        "repeats": repeats,
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    prompts = load_prompts("plain", "benign")
    with tempfile.TemporaryDirectory() as folder:
        names = specs(Path(folder))
        asked = [(prompts[i % len(prompts)].text, names[i % len(names)]) for i in range(given.streams)]
        command = [sys.executable, "-m", "demur.cli.main", "serve", "--port", "0", "--spec", folder]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            try:
                assert server.stderr is not None
                address = next(found[0] for line in server.stderr if (found := re.findall(r"http://[\d.:]+", line)))
                result = asyncio.run(measure(address, asked, given.tokens, given.repeats))
            finally:
                server.terminate()
    if not given.json:
        for name, value in result.items():
            print(f"{name}: {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
