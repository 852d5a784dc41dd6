"""Run vLLM in a process of its own, on a list of requests: `answers(...)` for tests; the file itself is the process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
"""One thread, little memory, no questions asked of the network."""


def installed() -> bool:
    """Whether vLLM is. It is not imported, and this folder, which has its name, is not taken for it."""
    found = importlib.util.find_spec("vllm")
    return found is not None and found.origin is not None


class Ask(NamedTuple):
    """One request."""

    ids: Sequence[int]
    spec: Any = None
    """What it names; None for nothing."""
    n: int = 12
    salt: str | None = None


class Said(NamedTuple):
    """One answer."""

    ids: list[int]
    """The end-of-turn token left off."""
    cached: int
    """Tokens of the prompt whose KV blocks were there already."""
    error: str = ""


class Ran(NamedTuple):
    """What a process did."""

    batches: list[list[Said]]
    preemptions: int
    log: str


def answers(model: Path, batches: Sequence[Sequence[Ask]], env: Mapping[str, str], eos: set[int], **engine: Any) -> Ran:
    """Greedy answers to batches of requests, one batch after the other, by one engine."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        said = Path(folder) / "said.json"
        told = {"model": str(model), "engine": engine, "said": str(said), "eos": sorted(eos)}
        job.write_text(json.dumps({**told, "batches": [[list(ask) for ask in batch] for batch in batches]}))
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CACHE_ROOT": f"{folder}/cache"}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("DEMUR_", "VLLM_"))}
        kept = {key: value for key, value in os.environ.items() if key == "DEMUR_CACHE"}
        done = subprocess.run(
            [sys.executable, __file__, str(job)],
            env={**inherited, **kept, **QUIET, **own, **env},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        log = done.stdout + done.stderr
        if not said.exists():
            raise RuntimeError(log[-6000:])
        found = json.loads(said.read_text())
        return Ran([[Said(*one) for one in batch] for batch in found["batches"]], found["preemptions"], log)


def main(path: str) -> None:
    """The process: read the job, run it, write what was said."""
    job = json.loads(Path(path).read_text())
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from vllm import LLM, SamplingParams

    settings = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 32, "block_size": 32, "seed": 0}
    settings |= {"enforce_eager": True, "disable_log_stats": False, **job["engine"]}
    llm = LLM(job["model"], **settings)
    found = []
    for batch in job["batches"]:
        prompts, params, places = [], [], []
        said: list[Any] = [None] * len(batch)
        for place, (ids, spec, n, salt) in enumerate(batch):
            try:
                extra = None if spec is None else {"demur_spec": spec}
                params.append(SamplingParams(temperature=0, max_tokens=n, extra_args=extra))
            except Exception as error:
                said[place] = ([], 0, f"{type(error).__name__}: {error}")
                continue
            prompts.append({"prompt_token_ids": ids} | ({"cache_salt": salt} if salt else {}))
            places.append(place)
        outputs = llm.generate(prompts, params, use_tqdm=False) if prompts else []
        for place, output in zip(places, outputs, strict=True):
            ids = [one for one in output.outputs[0].token_ids if one not in job["eos"]]
            said[place] = (ids, output.num_cached_tokens or 0)
        found.append(said)
    counts = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    Path(job["said"]).write_text(
        json.dumps({"batches": found, "preemptions": int(counts.get("vllm:num_preemptions", 0))})
    )


if __name__ == "__main__":
    main(sys.argv[1])
