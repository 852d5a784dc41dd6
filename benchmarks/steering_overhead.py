"""What steering costs: whole generations against unsteered ones, and the edit alone against the usual hook.

    python benchmarks/steering_overhead.py --json

The usual hook is what libraries do: encode every latent, decode, keep the error, set one latent, decode again. Times
are taken in turns within one run and compared pair by pair; ratios are medians of pairs, with 95 % intervals.
`unsteered_again_ratio` is the unsteered model against itself, `gate_shut_over_again` the shut gate against that. No
second SAE ships with demur, so the two-layer spec uses the weights of the one that does at a second block: the cost is
the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import quantile_test
from torch import Tensor

from demur.lm.attach import Step
from demur.lm.batches import pad
from demur.lm.chat import chat_ids
from demur.lm.load import LanguageModel, load
from demur.sae.base import Sae
from demur.sae.store import load_sae
from demur.sae.thresholded import JumpReluSae
from demur.sae.topk import TopKSae
from demur.spec import Edit, ProbeGate, SteeringSpec
from demur.steering.counter import Counter
from demur.steering.layer import SaeEdits
from demur.steering.spec_file import read_spec
from demur.steering.steer import steer
from demur.types import SAFETY_SYSTEM_PROMPT, Message

NEW_TOKENS = 48
SIZES = ((576, 4608), (3072, 24576), (4096, 65536))
TOKENS = (1, 8, 512)
K = 32
GATE = ("unsteered_again_ratio", "gate_shut_ratio", "gate_open_ratio")
SECOND_BLOCK = "layers.12.resid_post"
QUESTIONS = (
    "How do I bake bread?",
    "Write a short poem about rain.",
    "What is the capital of France, and why is it famous?",
    "How do vaccines work?",
    "Explain gravity to a child.",
    "Give me three ideas for a birthday present.",
    "What should I look for when I buy a used bicycle?",
    "Summarise the plot of Hamlet.",
)


def paired(base: Callable[[], object], others: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Ratios of each of `others` to `base`, round by round, in an order that changes from round to round."""
    ratios: list[list[float]] = [[] for _ in others]
    draw = random.Random(0)
    runs = [base, *others]
    for turn in range(rounds + 1):
        seconds = {place: timed(runs[place]) for place in draw.sample(range(len(runs)), len(runs))}
        if turn:  # the first round warms up
            for place in range(len(others)):
                ratios[place].append(seconds[place + 1] / seconds[0])
        say(f"  round {turn} of {rounds}")
    return ratios


def median_interval(values: Sequence[float]) -> list[float]:
    """95 % interval of the median, from order statistics; at least as wide as it says."""
    return list(map(float, quantile_test(values, p=0.5).confidence_interval(0.95)))


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def repeat(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def calls(run: Callable[[], object], seconds: float = 0.01) -> int:
    """How often to run what is timed at once: a call of microseconds would measure the clock."""
    return max(1, int(seconds / min(timed(run) for _ in range(3))))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- whole generations ----------------------------------------------------------------------------


def answer(lm: LanguageModel, batch: Any, spec: Any) -> None:
    model: Any = lm.model
    settings = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": lm.pad_id,
    }
    with torch.no_grad():
        if spec is None:
            model.generate(input_ids=batch.ids, attention_mask=batch.mask, **settings)
        else:
            with steer(lm, spec):
                model.generate(input_ids=batch.ids, attention_mask=batch.mask, **settings)


def generations(rounds: int, value: float, only_gate: bool = False) -> dict[str, Any]:
    lm, loaded = load("smollm2-135m-instruct"), load_sae("smollm2-135m-instruct")
    rates = loaded.sae.reference.rate if loaded.sae.reference is not None else torch.zeros(loaded.sae.d_sae)
    # latents that are neither silent nor everywhere, as those are that anyone steers
    latents = torch.argsort((rates - 0.013).abs())[:8].tolist()
    asked = [
        chat_ids(lm, [Message("system", SAFETY_SYSTEM_PROMPT), Message("user", question)]) for question in QUESTIONS
    ]

    def clamp(hookpoint: str, latent: int) -> Edit:
        return Edit(hookpoint, loaded.hash, (latent,), value)

    place = loaded.config.hookpoint
    one = SteeringSpec((clamp(place, latents[0]),))
    mixed = [
        SteeringSpec((clamp(place, latents[i]), clamp(SECOND_BLOCK, latents[(i + 1) % 8]))) for i in range(len(asked))
    ]
    # the spec that ships, with a gate that never opens, and one that opens for every row
    gated = read_spec(Path("balanced"))
    assert isinstance(gated.gate, ProbeGate)
    shut, opened = (replace(gated, gate=replace(gated.gate, threshold=threshold)) for threshold in (1.0, 0.0))
    found: dict[str, Any] = {}
    # None: unsteered against itself, which is what a ratio of 1 looks like on the machine at hand
    runs: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
        "batch1": (asked[:1], {"batch1_ratio": one}),
        "batch8": (
            asked,
            {
                "batch8_ratio": one,
                "mixed_ratio": mixed,
                "unsteered_again_ratio": None,
                "gate_shut_ratio": shut,
                "gate_open_ratio": opened,
            },
        ),
    }
    for name, (rows, specs) in runs.items():
        if only_gate:
            specs = {label: spec for label, spec in specs.items() if label in GATE}
        if not specs:
            continue
        say(f"{name}: {NEW_TOKENS} tokens, unsteered and steered in turns")
        batch = pad(lm, rows, side="left")
        start = time.perf_counter()
        ratios = paired(
            partial(answer, lm, batch, None), [partial(answer, lm, batch, s) for s in specs.values()], rounds
        )
        found[f"{name}_seconds_a_round"] = (time.perf_counter() - start) / (rounds + 1)
        measured = dict(zip(specs, ratios, strict=True))
        for label, values in measured.items():
            found[label] = statistics.median(values)
            found[f"{label}_quartiles"] = statistics.quantiles(values, n=4)[::2]
            found[f"{label}_interval"] = median_interval(values)
        for label in ("gate_shut", "gate_open"):
            if f"{label}_ratio" in measured:
                pairs = zip(measured[f"{label}_ratio"], measured["unsteered_again_ratio"], strict=True)
                over = [steered / again for steered, again in pairs]
                found[f"{label}_over_again"] = statistics.median(over)
                found[f"{label}_over_again_interval"] = median_interval(over)
    return found


# --- the edit alone -------------------------------------------------------------------------------


def usual(sae: Sae, x: Tensor, latent: int, value: float) -> Tensor:
    """Encode all, decode, keep the error, set the latent, decode again."""
    f = sae.encode(x)
    error = x - sae.decode(f)
    f = f.clone()
    f[..., latent] = value
    return sae.decode(f) + error


def exact(sae: Sae, x: Tensor, latent: int, value: float) -> Tensor:
    """The same in float64, by the definition."""
    x = x.double()
    p = (x - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
    if isinstance(sae, TopKSae):
        f = torch.zeros_like(p)
        top = p.topk(sae.k)
        f.scatter_(-1, top.indices, top.values.clamp(min=0))
    else:
        assert isinstance(sae, JumpReluSae)
        f = torch.where(p > sae.threshold.double(), p, 0).clamp(min=0)
    w, b = sae.W_dec.double(), sae.b_dec.double()
    error = x - (f @ w + b)
    f[..., latent] = value
    return f @ w + b + error


class Ours:
    """The engine's edit, counters included, as its hook runs it."""

    def __init__(self, sae: Sae, latent: int, value: float, tokens: int) -> None:
        self._edits = SaeEdits(sae, "s", [[Edit("layers.0", "s", (latent,), value)]], True, [False])
        self._counter = Counter(self._edits.names, "layers.0", self._edits.rows)
        at = torch.arange(1, tokens + 1).unsqueeze(0)
        row = torch.zeros(1, dtype=torch.long)
        self._step = Step(at, torch.tensor([tokens]), row, row, 1, 1, False, True, None)
        self._which, self._on = row, torch.ones(tokens, 1, dtype=torch.bool)

    def __call__(self, x: Tensor) -> Tensor:
        move = self._edits.move(x, self._which, self._on)
        self._counter.add(move, self._step)
        return torch.addmm(x, move.sizes, self._edits.rows)


def random_sae(kind: str, d: int, m: int, active: bool) -> Sae:
    """Random weights; latent 0 active on every token, or on none in a hundred."""
    sae: Sae = TopKSae(d, m, K) if kind == "topk" else JumpReluSae(d, m)
    with torch.no_grad():
        sae.W_enc.normal_(std=d**-0.5)
        sae.W_dec.normal_(std=d**-0.5)
        sae.b_dec.normal_(std=0.1)
        if isinstance(sae, JumpReluSae):
            sae.threshold.fill_(3.0)
        # pre-activations are about standard normal
        sae.b_enc[0] = 9.0 if active else -2.4
    return sae.requires_grad_(False)


def edits(sizes: Sequence[tuple[int, int]], rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    speedups: dict[str, list[float]] = {"rare": [], "active": [], "jumprelu": []}
    worst = 0.0
    detail: dict[str, float] = {}
    for d, m in sizes:
        for name, kind, active in (("rare", "topk", False), ("active", "topk", True), ("jumprelu", "jumprelu", True)):
            sae = random_sae(kind, d, m, active)
            theirs = copy.deepcopy(sae)  # demur lays its own encoder out another way
            for tokens in TOKENS:
                x = torch.randn(tokens, d)
                ours = Ours(sae, 0, 5.0, tokens)
                with torch.no_grad():
                    got, expected = ours(x).double(), exact(sae, x[:32], 0, 5.0)
                    worst = max(worst, float((got[:32] - expected).norm() / expected.norm()))
                    repeats = max(1, min(rounds * 20, int(3e10 / (6.0 * d * m * tokens))))
                    pairs = []
                    slow_calls, fast_calls = calls(partial(usual, theirs, x, 0, 5.0)), calls(partial(ours, x))
                    for turn in range(repeats + 1):
                        slow = timed(lambda: repeat(partial(usual, theirs, x, 0, 5.0), slow_calls)) / slow_calls  # noqa: B023
                        fast = timed(lambda: repeat(partial(ours, x), fast_calls)) / fast_calls  # noqa: B023
                        if turn or repeats == 1:
                            pairs.append(slow / fast)
                speedups[name].append(statistics.median(pairs))
                detail[f"{name} {d}x{m} {tokens} tokens"] = round(statistics.median(pairs), 2)
                say(f"{name} {d}x{m}, {tokens} tokens: {statistics.median(pairs):.1f} times faster than the usual hook")
    found = {f"edit_speedup_{name}": min(values) for name, values in speedups.items()}
    return {**found, "max_rel_err": worst, "edit_speedups": detail}  # type: ignore[dict-item]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON line last")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of whole generations")
    parser.add_argument("--value", type=float, default=2.0, help="clamp value; small, so that texts stay texts")
    parser.add_argument("--small", action="store_true", help="smallest SAE only, for a quick look")
    parser.add_argument("--only", choices=["generations", "edits", "gate"], help="a part of it")
    chosen = parser.parse_args()
    result: dict[str, Any] = {}
    if chosen.only != "edits":
        result |= generations(chosen.rounds, chosen.value, chosen.only == "gate")
    if chosen.only not in ("generations", "gate"):
        result |= edits(SIZES[:1] if chosen.small else SIZES, chosen.rounds)
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    print(json.dumps(result) if chosen.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
