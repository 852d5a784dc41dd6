"""SAE training against sparsify, dictionary_learning and SAELens, and harvesting against the bare model.

    python benchmarks/sae_training.py --json

All train a top-k SAE (4,608 latents, k = 32, batches of 4,096) on the same stored residuals of width 576, each in an
environment of its own, through its public classes (`peers/`). Two parts in one run:

- speed: rounds of short runs, every trainer in turn, so that all see the same machine; medians over all rounds.
  sparsify also runs with micro-batches and counts with whichever is faster.
- quality: 100 steps of each, held-out FVU on the way. Each peer is run at several learning rates and counts with its
  best; demur is run at its default. Seconds to an FVU are steps to it times the median seconds of a step;
  `time_to_fvu_ratio` is the smallest over peers of their seconds for 100 steps over demur's to the FVU they reach.

The floor is the encoder's matrix product alone on the same batch, in the same process, in turns with the steps.
Residuals are the shards that `demur sae train` leaves in its work folder (`--activations`).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from peer_environment import PEERS, peer_python  # noqa: E402

from demur import progress  # noqa: E402
from demur.data.prompts import OWN, load_prompts  # noqa: E402
from demur.lm.batches import batches, pad  # noqa: E402
from demur.lm.chat import with_system  # noqa: E402
from demur.lm.harvest import harvest  # noqa: E402
from demur.lm.load import load  # noqa: E402
from demur.lm.token_types import Typed, typed_chat  # noqa: E402
from demur.sae.training.activations import Position, Shards  # noqa: E402
from demur.types import SAFETY_SYSTEM_PROMPT, parse_hookpoint  # noqa: E402

D_SAE, K, BATCH, STEPS = 4608, 32, 4096, 100
HELDOUT = 16_384
ROUNDS, ROUND_STEPS = 4, 9
LOOKS = (20, 40, 60, 80, 100)
RATES = {
    "sparsify": (0.5, 1.0, 2.0),
    "dictionary_learning": (1.0, 5.0, 10.0, 20.0),
    "saelens": (1.0, 10.0, 30.0),
}
"""Multiples of each peer's own learning rate at which it is tried."""
OWN_RATE = {"sparsify": 5e-3 / (D_SAE / 2**14) ** 0.5, "dictionary_learning": 2e-4 / (D_SAE / 2**14) ** 0.5,
            "saelens": 3e-4}  # fmt: skip
OPTIONS = {"sparsify": ({}, {"micro_batches": 4}), "dictionary_learning": ({},), "saelens": ({"lr_decay_steps": 20},)}
"""Ways to run each peer that change its speed."""


def prepare(folder: Path, activations: Path) -> dict[str, str]:
    """The same residuals for everyone, as float32: to train on, shuffled, and others to evaluate on."""
    shards = Shards(activations)
    name = shards.hookpoints[0]
    needed = STEPS * BATCH + HELDOUT
    if shards.tokens < needed + BATCH:
        sys.exit(
            f"{activations} holds {shards.tokens:,} tokens, expected {needed + BATCH:,} or more: train on more text"
        )
    rows = []
    for batch in shards.batches(BATCH, 0, Position()):
        rows.append(batch.x[name].float())
        if len(rows) * BATCH >= needed:
            break
    x = torch.cat(rows)
    files = {"train": x[: STEPS * BATCH], "heldout": x[STEPS * BATCH : needed]}
    for file, part in files.items():
        save_file({"x": part.contiguous()}, folder / f"{file}.safetensors")
    return {file: str(folder / f"{file}.safetensors") for file in files}


def trained(name: str, folder: Path, job: dict[str, Any], threads: int) -> dict[str, Any]:
    """What the trainer `name` made of `job`."""
    python = Path(sys.executable) if name == "demur" else peer_python(name)
    out = folder / "out.json"
    given = {"d_sae": D_SAE, "k": K, "batch": BATCH, "threads": threads, "seed": 0, "lr": None, "evaluate_at": []}
    (folder / "job.json").write_text(json.dumps({**given, **job, "out": str(out)}), encoding="utf-8")
    script = Path(__file__).parent / "peers" / f"by_{name}.py"
    done = subprocess.run(
        [str(python), str(script), str(folder / "job.json")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def speed(names: list[str], folder: Path, files: dict[str, str], threads: int) -> dict[str, Any]:
    """Median seconds of a step of each trainer, and of the floor, in turns."""
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in OPTIONS.get(name, ({},))] for name in names}
    floors: list[list[float]] = [[], []]
    shares = []
    for number in range(ROUNDS):
        for name in names:
            for i, options in enumerate(OPTIONS.get(name, ({},))):
                job = {**files, **options, "steps": ROUND_STEPS, "floor": name == "demur"}
                found = trained(name, folder, job, threads)
                seconds[name][i] += found["step_seconds"][3:]
                if name == "demur":
                    floor = [part[3:] for part in found["floor_seconds"]]
                    floors = [a + b for a, b in zip(floors, floor, strict=True)]
                    shares.append(min(map(statistics.median, floor)) / statistics.median(found["step_seconds"][3:]))
                progress.say(
                    f"round {number + 1}/{ROUNDS}: {name} {options or ''} "
                    f"{statistics.median(found['step_seconds'][3:]) * 1e3:.0f} ms a step"
                )
    best = {name: min(statistics.median(part) for part in parts) for name, parts in seconds.items()}
    return {
        "step_ms": {name: value * 1e3 for name, value in best.items()},
        "floor_ms": min(map(statistics.median, floors)) * 1e3,
        "floor_share": statistics.median(shares),
        "tokens_per_s": {name: BATCH / value for name, value in best.items()},
    }


def quality(names: list[str], folder: Path, files: dict[str, str], threads: int) -> dict[str, Any]:
    """Held-out FVU along 100 steps: [(steps, FVU)] of each, the peers at their best learning rate."""
    curves = {}
    for name in names:
        tried = []
        for factor in RATES.get(name, (None,)):
            lr = None if factor is None else OWN_RATE[name] * factor
            job = {**files, **OPTIONS.get(name, ({},))[0], "steps": STEPS, "lr": lr, "evaluate_at": LOOKS}
            found = trained(name, folder, job, threads)
            tried.append({"lr": found["lr"], "curve": [(step, fvu) for step, _, fvu in found["curve"]]})
            progress.say(f"{name} at learning rate {found['lr']:.2e}: held-out FVU {found['curve'][-1][2]:.4f}")
        curves[name] = {
            **min(tried, key=lambda run: run["curve"][-1][1]),
            "version": found["version"],
            "tried": {f"{run['lr']:.2e}": run["curve"][-1][1] for run in tried},
        }
    return curves


def steps_to(curve: list[tuple[int, float]], fvu: float) -> float:
    """Steps at which `curve` reaches `fvu`, between two looks by a straight line; infinity where it does not."""
    before = (0, 1.0)
    for step, value in curve:
        if value <= fvu:
            share = (before[1] - fvu) / max(before[1] - value, 1e-12)
            return before[0] + share * (step - before[0])
        before = (step, value)
    return float("inf")


def harvest_ratio(rounds: int = 5) -> dict[str, float]:
    """Tokens per second of `harvest`, shards written, over the model cut off at the same block, on the same batches."""
    lm = load("smollm2-135m-instruct")
    hookpoint = parse_hookpoint("layers.16.resid_post")
    prompts = [p for name in OWN for p in load_prompts(name, "benign")][:256]
    rows = [typed_chat(lm, with_system(p, SAFETY_SYSTEM_PROMPT), generation=True) for p in prompts]
    cut = copy.copy(lm.model.get_decoder())
    cut._modules = dict(cut._modules)
    cut._modules["layers"] = cut.layers[: hookpoint.block + 1]
    lengths = [len(row.ids) for row in rows]
    padded = [
        pad(lm, [rows[i].ids for i in batch], side="right") for batch in batches(lengths, max(1, 2048 // max(lengths)))
    ]

    def bare() -> None:
        with torch.no_grad():
            for part in padded:
                cut(input_ids=part.ids, attention_mask=part.mask, use_cache=False)

    def ours(folder: Path) -> None:
        def group() -> list[Typed]:
            return rows

        harvest(lm, [hookpoint], [group], "benchmark", folder, 0)

    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first"
        ours(first)
        for number in range(rounds):
            target = Path(folder) / str(number)
            target.mkdir()
            (target / "harvest.json").write_bytes((first / "harvest.json").read_bytes())  # norms are measured once
            start = time.perf_counter()
            bare()
            middle = time.perf_counter()
            ours(target)
            ratios.append((middle - start) / (time.perf_counter() - middle))
    progress.say(f"harvest over bare model: {statistics.median(ratios):.3f}")
    return {"harvest_ratio": statistics.median(ratios), "harvest_tokens": sum(lengths)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON line last")
    parser.add_argument("--activations", type=Path, default=ROOT / "build/embedded-sae/sae/work/train")
    parser.add_argument("--peers", nargs="*", choices=sorted(PEERS), default=sorted(PEERS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=["speed", "quality", "harvest"], help="one part")
    given = parser.parse_args()
    names = ["demur", *given.peers]
    for name in given.peers:
        peer_python(name)
    with progress.shown(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "threads": given.threads}
        if given.only in (None, "harvest"):
            result |= harvest_ratio()
        if given.only != "harvest":
            files = prepare(folder, given.activations)
        if given.only in (None, "speed"):
            timed = speed(names, folder, files, given.threads)
            tokens = timed.pop("tokens_per_s")
            result |= {**timed, "tokens_per_s": tokens.pop("demur"), "peers": tokens}
            result["speedup"] = result["tokens_per_s"] / max(tokens.values(), default=float("nan"))
        if given.only in (None, "quality"):
            curves = quality(names, folder, files, given.threads)
            finals = {name: run["curve"][-1][1] for name, run in curves.items()}
            best = min(given.peers, key=finals.__getitem__)
            result |= {
                "fvu": finals,
                "best_peer": best,
                "fvu_minus_best_peer": finals["demur"] - finals[best],
                "curves": curves,
            }
            if given.only is None:
                result["time_to_fvu_ratios"] = {
                    name: STEPS * timed["step_ms"][name] / (steps_to(curves["demur"]["curve"], finals[name]) * own)
                    for name in given.peers
                    for own in [timed["step_ms"]["demur"]]
                }
                result["time_to_fvu_ratio"] = min(result["time_to_fvu_ratios"].values())
        if given.json:
            print(json.dumps(result))
        else:
            print(json.dumps({key: value for key, value in result.items() if key != "curves"}, indent=1))


if __name__ == "__main__":
    main()
