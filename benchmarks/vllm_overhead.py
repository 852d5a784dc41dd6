"""What steering costs vLLM, and whether its answers are those of demur's own engine.

    python benchmarks/vllm_overhead.py --json [--rounds 21] [--tokens 32]

Needs vLLM and demur in one environment. Two processes hold the embedded model in float32: one in which no plugin was
loaded, one with demur's, where every request clamps latent 957 to 8. They answer the same batch in turns, so that
what else the machine does meets both; the ratio is the median over pairs. Then 32 prompts under 8 specs each, mixed in
one batch, are compared token for token with demur's own engine; where they differ, the margin between its two best
logits says whether rounding decided.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from demur.data.prompts import OWN, load_prompts
from demur.lm.attach import prompt_lengths
from demur.lm.chat import chat_ids
from demur.lm.embedded import fetch
from demur.lm.generate import generate
from demur.lm.load import LanguageModel, load
from demur.record import to_json, write_json
from demur.spec import Edit, LatentGate, Positions, SteeringSpec
from demur.steering.steer import steer
from demur.types import Message

PLACE, SAE = "layers.16.resid_post", "5c82595e3721b45f"
TIE = 1e-3
"""Margin between the two best logits below which rounding decides: float32 passes in other shapes differ by 1e-4."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def specs() -> dict[str, SteeringSpec]:
    """Eight specs: ops, positions and a gate."""
    clamp = SteeringSpec((Edit(PLACE, SAE, (957,), 8.0),))
    return {
        "unsteered": SteeringSpec(),
        "clamp": clamp,
        "floor": SteeringSpec((Edit(PLACE, SAE, (957, 12), 6.0, "floor"),)),
        "add": SteeringSpec((Edit(PLACE, SAE, (957,), 5.0, "add"),)),
        "scale": SteeringSpec((Edit(PLACE, SAE, tuple(range(950, 958)), 1.5, "scale"),)),
        "first": replace(clamp, positions=Positions("generation", first=4)),
        "gated": replace(clamp, gate=LatentGate(PLACE, SAE, 957, 1.0, positions=Positions("prompt"))),
        "inline": SteeringSpec((Edit(PLACE, SAE, (957,), 12.0), Edit(PLACE, SAE, (33,), op="ablate"))),
    }


def written_for_vllm(lm: LanguageModel, folder: Path) -> Path:
    """The embedded model with its embeddings under the name that vLLM looks for."""
    own = fetch().folder
    shutil.copytree(own, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {name: value.clone() for name, value in lm.model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


class Engine:
    """vLLM in a process of its own, which answers one line of JSON by another."""

    def __init__(self, model: Path, folder: Path, threads: int, plugin: bool, eager: bool, batched: int) -> None:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("DEMUR_", "VLLM_"))}
        env |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
        env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        env |= {"OMP_NUM_THREADS": str(threads), "VLLM_CACHE_ROOT": str(folder / f"cache-{plugin}")}
        env |= {"VLLM_PLUGINS": "demur", "DEMUR_SPECS": str(folder / "specs")} if plugin else {"VLLM_PLUGINS": ""}
        settings = json.dumps({"model": str(model), "enforce_eager": eager, "max_num_seqs": batched})
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--engine", settings],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, requests: list[tuple[list[int], str | None]], tokens: int, eos: bool) -> dict[str, Any]:
        """Ids of the answers, and the seconds they took."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([requests, tokens, eos]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                found: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return found
        raise SystemExit("vLLM's process ended; its message stands above")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


def serve(settings: dict[str, Any]) -> None:
    """The process of an `Engine`."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from vllm import LLM, SamplingParams

    llm = LLM(settings.pop("model"), dtype="float32", max_model_len=1024, seed=0, **settings)
    for line in sys.stdin:
        requests, tokens, eos = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=not eos,
                detokenize=False,
                extra_args=None if spec is None else {"demur_spec": spec},
            )
            for _, spec in requests
        ]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        ids = [list(output.outputs[0].token_ids) for output in outputs]
        print("ANSWER " + json.dumps({"ids": ids, "seconds": seconds}), flush=True)


def margin(lm: LanguageModel, ids: list[int], spec: SteeringSpec, written: list[int]) -> float:
    """Between the two best logits of the token after `ids` and `written`."""
    step = torch.tensor([[*ids, *written]])
    model: Any = lm.model
    with torch.no_grad(), steer(lm, spec), prompt_lengths(lm.model, torch.tensor([len(ids)])):
        best = model(step).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def throughput(plain: Engine, steered: Engine, asked: list[list[int]], rounds: int, tokens: int) -> dict[str, Any]:
    """Tokens a second with steering over those without a plugin, pair by pair."""
    ratios: list[float] = []
    seconds: dict[str | None, list[float]] = {None: [], "clamp": []}
    for turn in range(rounds + 1):
        pair = [(plain, None), (steered, "clamp")]
        took = {}
        for engine, spec in pair if turn % 2 else pair[::-1]:
            took[spec] = engine.ask([(ids, spec) for ids in asked], tokens, eos=False)["seconds"]
        say(f"  round {turn} of {rounds}: {took[None]:.2f} s without, {took['clamp']:.2f} s steered")
        if turn:  # the first warms up
            ratios.append(took[None] / took["clamp"])
            for spec in seconds:
                seconds[spec].append(took[spec])
    quartiles = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2
    return {
        "throughput_ratio": statistics.median(ratios),
        "throughput_ratio_quartiles": quartiles,
        "throughput_ratio_of_best": min(seconds[None]) / min(seconds["clamp"]),
        "tokens_per_second": len(asked) * tokens / statistics.median(seconds[None]),
    }


def compare(lm: LanguageModel, steered: Engine, asked: list[list[int]], tokens: int) -> dict[str, Any]:
    """Whether a mixed batch in vLLM says what demur's own engine says."""
    chosen = specs()
    requests = [(ids, name) for ids in asked for name in chosen]
    named = [(ids, json.dumps(to_json(chosen[name])) if name == "inline" else name) for ids, name in requests]
    said = [[one for one in ids if one not in lm.eos_ids] for ids in steered.ask(named, tokens, eos=True)["ids"]]
    differ, ties = [], 0
    for start in range(0, len(requests), 32):
        part = requests[start : start + 32]
        with steer(lm, [chosen[name] for _, name in part]):
            expected = [answer.ids for answer in generate(lm, [ids for ids, _ in part], tokens)]
        for (ids, name), one, other in zip(part, said[start : start + 32], expected, strict=True):
            if one != other:
                same = next(
                    (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
                )
                gap = margin(lm, ids, chosen[name], other[:same])
                ties += gap < TIE
                differ.append({"spec": name, "after": same, "margin": gap})
        say(f"  compared {start + len(part)} of {len(requests)}, {len(differ)} differ")
    changed = sum(said[i] != said[i - i % len(chosen)] for i in range(len(said)))
    return {
        "identical": not differ,
        "compared": len(requests),
        "changed_by_steering": changed,
        "differ": differ,
        "differ_at_near_ties": ties,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON line last")
    parser.add_argument("--rounds", type=int, default=21, help="pairs of timed batches")
    parser.add_argument("--batch", type=int, default=16, help="prompts of a timed batch")
    parser.add_argument("--tokens", type=int, default=32, help="tokens written to each")
    parser.add_argument("--compared", type=int, default=24, help="tokens compared of each answer")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--only", choices=["throughput", "identical"], help="one half of it")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.engine:
        serve(json.loads(chosen.engine))
        return
    lm = load("smollm2-135m-instruct")
    prompts = [prompt for name in OWN for prompt in load_prompts(name, "benign")][:: max(1, 150 // 32)]
    asked = [chat_ids(lm, [Message("user", prompt.messages[0].content)]) for prompt in prompts][:32]
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, spec in specs().items():
            if name not in ("unsteered", "inline"):
                write_json(folder / "specs" / f"{name}.json", to_json(spec))
        model = written_for_vllm(lm, folder / "model")
        say("starting vLLM with demur")
        steered = Engine(model, folder, chosen.threads, True, chosen.eager, 256)
        if chosen.only != "identical":
            say("starting vLLM without")
            plain = Engine(model, folder, chosen.threads, False, chosen.eager, 256)
            result |= throughput(plain, steered, asked[: chosen.batch], chosen.rounds, chosen.tokens)
            plain.close()
        if chosen.only != "throughput":
            torch.set_num_threads(chosen.threads)
            result |= compare(lm, steered, asked, chosen.compared)
        steered.close()
    result |= {"threads": chosen.threads, "compiled": not chosen.eager, "torch": torch.__version__}
    result |= {"machine": platform.machine()}
    print(json.dumps(result) if chosen.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
