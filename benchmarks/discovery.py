"""Discovery against the plain loop, on the embedded model: how much faster, and is the latent as good?

    python benchmarks/discovery.py [--json] [--set-size 3] [--out build/discovery-benchmark] [--own 6]

The plain loop is the paper's: every archetypal candidate is clamped at 12, transformers' own `generate` answers 32
harmful and 32 plain select prompts with 24 new tokens, all in one batch, and each answer is judged. It runs under
`demur.steer`, whose clamp costs next to nothing; nothing else of demur's makes it faster. For comparison `--own` of the
candidates are also timed on demur's batches (shared system prompt, finished rows leave), which is what demur's own loop
would take for all.

Ours is `demur select` as it comes, on the same select prompts and answer length. Loading the model is in neither time;
unsteered answers are in both, controls, curves and stability (`effects` and later steps) in neither: the plain loop has
no such thing. Then both winners, each at its own value, answer all harmful and plain test prompts, which neither saw.
Everything is kept in `--out`, and a run that was killed goes on; delete the folder to measure again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from demur import progress
from demur.data.prompts import load_prompts, take
from demur.eval.rows import ANY, FULL
from demur.eval.statistics import bootstrap_mean, mcnemar_p, rate
from demur.lm.batches import pad
from demur.lm.generate import AS_ASKED, generate
from demur.record import from_json, read_json, to_json
from demur.spec import SteeringSpec
from demur.steering.steer import steer
from demur.types import Completion, Discovery, Effect, Intent, LatentRanking, Prompt
from demur.verbs.config import DiscoveryConfig
from demur.verbs.finding import Finding
from demur.verbs.select import begin, found

VALUE, TOKENS, PROMPTS = 12.0, 24, 32
INTENTS: dict[str, Intent] = {"harmful": "harmful", "plain": "benign"}
SEARCH = ("own refusals", "propose", "screen", "first words", "answers")


def plainly(finding: Finding, rows: list[list[int]], spec: SteeringSpec) -> list[str]:
    """Answers to `rows`, as anyone would get them from transformers."""
    lm = finding.lm
    padded = pad(lm, rows, side="left")
    model: Any = lm.model
    with torch.no_grad(), steer(lm, spec, finding.saes):
        ids = model.generate(
            input_ids=padded.ids,
            attention_mask=padded.mask,
            max_new_tokens=TOKENS,
            do_sample=False,
            **AS_ASKED,
            pad_token_id=lm.pad_id,
            eos_token_id=sorted(lm.eos_ids),
        )
    return [
        str(text).strip() for text in lm.tokenizer.batch_decode(ids[:, padded.ids.shape[1] :], skip_special_tokens=True)
    ]


def labels(finding: Finding, prompts: list[Prompt], texts: list[str]) -> list[str]:
    """Judged."""
    return [finding.label(p, Completion(p.id, "", text, 0, "length")) for p, text in zip(prompts, texts, strict=True)]


def plain_loop(finding: Finding, path: Path) -> tuple[list[dict[str, Any]], float]:
    """One row for each archetypal candidate, and the seconds of all."""
    prompts = [*finding.harmful, *finding.plain]
    rows = finding.rows(prompts)
    candidates = from_json(LatentRanking, read_json(finding.folder / "rankings/archetype.json"), "")
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {row["latent"] for row in done}
    latents = [-1, *(score.latent for score in candidates.scores)]
    with progress.track("plain loop", len(latents), "candidates") as advance:
        for latent in latents:
            if latent not in known:
                start = time.perf_counter()
                spec = finding.clamp(latent, VALUE) if latent >= 0 else SteeringSpec()
                said = labels(finding, prompts, plainly(finding, rows, spec))
                half = len(finding.harmful)
                row = {
                    "latent": latent,
                    "harmful": sum(label in FULL for label in said[:half]),
                    "benign": sum(label in ANY for label in said[half:]),
                    "degenerate": said.count("degenerate"),
                    "seconds": time.perf_counter() - start,
                }
                done.append(row)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            advance(1)
    return [row for row in done if row["latent"] >= 0], sum(row["seconds"] for row in done)


def own_loop(finding: Finding, latents: list[int]) -> float:
    """Seconds a candidate on demur's own batches."""
    rows = finding.rows([*finding.harmful, *finding.plain])
    start = time.perf_counter()
    for latent in latents:
        with steer(finding.lm, finding.clamp(latent, VALUE), finding.saes):
            generate(finding.lm, rows, TOKENS)
    return (time.perf_counter() - start) / max(len(latents), 1)


def held_out(finding: Finding, spec: SteeringSpec) -> dict[str, list[str]]:
    """Labels of the answers to all test prompts, by set."""
    sets = {name: take(load_prompts(name, intent), "test") for name, intent in INTENTS.items()}
    return {name: finding.labels(prompts, [spec])[0] for name, prompts in sets.items()}


def share(said: list[str], counts: frozenset[Any]) -> dict[str, Any]:
    """Refused / scored."""
    scored = [label for label in said if label != "unscored"]
    return to_json(rate(sum(label in counts for label in scored), len(scored)))


def paired(before: list[str], after: list[str], counts: frozenset[Any]) -> dict[str, float]:
    """Points gained from `before` to `after`, with interval and exact p."""
    pairs = [(a in counts, b in counts) for a, b in zip(before, after, strict=True) if "unscored" not in (a, b)]
    points = bootstrap_mean([100.0 * (b - a) for a, b in pairs])
    p = mcnemar_p(sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))
    return {"points": points.value, "low": points.low, "high": points.high, "p": p, "n": len(pairs)}


def top(rows: list[tuple[int, float]], n: int) -> set[int]:
    """The first `n` by score, with all that tie with the last of them."""
    rows = sorted(rows, key=lambda row: -row[1])
    return {latent for latent, score in rows if score >= rows[min(n, len(rows)) - 1][1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/discovery-benchmark"))
    parser.add_argument("--own", type=int, default=6, help="candidates timed on demur's own batches")
    parser.add_argument("--set-size", type=int, default=0, help="also look for a set of latents")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    config = DiscoveryConfig(max_new_tokens=TOKENS, select_prompts=PROMPTS)
    with progress.shown():
        result = run(config, options.out, options.own, options.set_size)
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:22} {json.dumps(value)}")


def run(config: DiscoveryConfig, out: Path, own: int, set_size: int) -> dict[str, Any]:
    """The whole comparison."""
    out.mkdir(parents=True, exist_ok=True)
    finding, _ = begin("benchmark", config, out, "discovery.json")
    with FileLock(out / ".lock", timeout=0):
        discovery: Discovery = found(finding, set_size)
        seconds = {name: discovery.seconds[name] for name in SEARCH}
        rows, plain_seconds = plain_loop(finding, out / "plain.jsonl")
        own_seconds = own_loop(finding, [row["latent"] for row in rows[:own]]) * (len(rows) + 1) if own else None
    plain_best = min(rows, key=lambda row: (-row["harmful"], row["benign"]))
    ours = finding.clamp(discovery.winner, discovery.value)
    base = held_out(finding, SteeringSpec())
    mine = held_out(finding, ours)
    theirs = held_out(finding, finding.clamp(plain_best["latent"], VALUE))
    five = top([(row["latent"], row["harmful"]) for row in rows], 5)
    judged = [e.latents[0] for e in discovery.finalists]
    ours_seconds = sum(seconds.values())
    result: dict[str, Any] = {
        "speedup": plain_seconds / ours_seconds,
        "same_winner": plain_best["latent"] == discovery.winner,
        "top5_overlap": min(5, len(five & set(judged))),
        "effect": paired(base["harmful"], mine["harmful"], FULL)["points"],
        "methods": discovery.places,
        "speedup_over_own_loop": own_seconds / ours_seconds if own_seconds else None,
        "seconds": {"plain": plain_seconds, "ours": ours_seconds, **seconds},
        "candidates": {"plain": len(rows), "ours": discovery.proposed},
        "winner": {"latent": discovery.winner, "value": discovery.value, "proposed_by": discovery.proposed_by},
        "plain_winner": plain_best,
        "plain_top5": sorted(five),
        "finalists": judged,
        "held_out": {
            "unsteered": {"harmful": share(base["harmful"], FULL), "plain": share(base["plain"], ANY)},
            "ours": {"harmful": share(mine["harmful"], FULL), "plain": share(mine["plain"], ANY)},
            "plain_loop": {"harmful": share(theirs["harmful"], FULL), "plain": share(theirs["plain"], ANY)},
            "ours_over_unsteered": paired(base["harmful"], mine["harmful"], FULL),
            "ours_over_plain_loop": paired(theirs["harmful"], mine["harmful"], FULL),
        },
    }
    if discovery.sets:
        result["sets"] = [
            set_against_single(finding, effect, alone, base)
            for effect, alone in zip(discovery.sets, discovery.singles, strict=True)
        ]
    return result


def set_against_single(finding: Finding, effect: Effect, alone: Effect, base: dict[str, list[str]]) -> dict[str, Any]:
    """A set of latents against the single latent on the test prompts, at equal harmful refusals on the select split."""
    value = alone.values[0]
    single = held_out(finding, finding.clamp(alone.latents, alone.values))
    several = held_out(finding, finding.clamp(effect.latents, effect.values))
    _, kl = finding.damage([finding.clamp(alone.latents, alone.values), finding.clamp(effect.latents, effect.values)])
    return {
        "label": effect.label,
        "latents": effect.latents,
        "values": effect.values,
        "single_value": value,
        "harmful": share(several["harmful"], FULL),
        "plain": share(several["plain"], ANY),
        "single_harmful": share(single["harmful"], FULL),
        "single_plain": share(single["plain"], ANY),
        "harmful_over_unsteered": paired(base["harmful"], several["harmful"], FULL),
        "harmful_over_single": paired(single["harmful"], several["harmful"], FULL),
        "plain_over_single": paired(single["plain"], several["plain"], ANY),
        "kl": float(kl[1].mean()),
        "single_kl": float(kl[0].mean()),
        "kl_over_single": bootstrap_mean((kl[1] - kl[0]).tolist())._asdict(),
    }


if __name__ == "__main__":
    main()
