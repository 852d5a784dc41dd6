"""How fast `demur eval` answers and judges prompts, against the loop that everyone writes first.

    python benchmarks/evaluation.py [--json] [--prompts 256] [--tokens 32] [--batch-size 128]
    python benchmarks/evaluation.py --task piqa:50 mmlu:1 --data-dir DIR [--json]

The plain loop asks transformers' `generate` one prompt after the other, greedily, unsteered, and judges each answer.
Ours is what `demur eval` does with the same prompts, its writing to disk included. Loading is in neither time. The
answers are compared: those that differ are near-ties that another batch shape turns.

With `--task` (needs `demur[eval]`): lm-eval's own `HFLM` against demur's model for lm-eval, unsteered, on the same
documents; how many samples have the same metrics, and how far log-likelihoods are apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from demur import progress
from demur.data.prompts import OWN, load_prompts
from demur.eval.complete import Completions
from demur.judges.rules import RulesJudge
from demur.lm.chat import chat_ids, with_system
from demur.lm.generate import AS_ASKED
from demur.lm.load import LanguageModel, load
from demur.spec import SteeringSpec
from demur.types import SAFETY_SYSTEM_PROMPT, Completion, Prompt
from demur.verbs.eval_config import named_limit


def plainly(lm: LanguageModel, prompt: Prompt, tokens: int) -> Completion:
    """One answer, as anyone would get it from transformers."""
    row = torch.tensor([chat_ids(lm, with_system(prompt, SAFETY_SYSTEM_PROMPT))])
    model: Any = lm.model
    with torch.no_grad():
        ids = model.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=tokens,
            do_sample=False,
            **AS_ASKED,
            pad_token_id=lm.pad_id,
            eos_token_id=sorted(lm.eos_ids),
        )
    written = ids[0, row.shape[1] :].tolist()
    stop = "eos" if lm.eos_ids & set(written) else "length"
    text = str(lm.tokenizer.decode(written, skip_special_tokens=True)).strip()
    return Completion(prompt.id, "unsteered", text, len(written), stop)  # type: ignore[arg-type]


def against_lm_eval(lm: LanguageModel, given: list[str], data_dir: Path | None) -> dict[str, Any]:
    """Seconds and samples of each task under lm-eval's own model class and under ours."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from demur.eval.harness import steered_lm
    from demur.eval.tasks import load_tasks, seed_shots

    found: dict[str, Any] = {}
    for name, limit in map(named_limit, given):
        tasks = load_tasks([name], data_dir)
        made: dict[str, Any] = {}
        for who in ("plain", "ours"):
            model = (
                HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=4, backend="causal")
                if who == "plain"
                else steered_lm(lm, SteeringSpec())
            )
            seed_shots(tasks)
            start = time.perf_counter()
            samples = evaluate(model, {"tasks": tasks}, limit=limit or None, bootstrap_iters=0)["samples"]
            made[who] = (time.perf_counter() - start, samples)
        pairs = [
            (one, other)
            for task in made["plain"][1]
            for one, other in zip(made["plain"][1][task], made["ours"][1][task], strict=True)
        ]
        scores = [
            (a[0][0], b[0][0])
            for one, other in pairs
            for a, b in zip(one["resps"], other["resps"], strict=True)
            if isinstance(a[0], tuple | list)
        ]
        found[name] = {
            "documents": len({(one["doc_hash"], one["doc_id"]) for one, _ in pairs}),
            "samples": len(pairs),
            "same_samples": sum(all(a[m] == b[m] for m in a["metrics"]) for a, b in pairs),
            "largest_log_likelihood_gap": max((abs(a - b) for a, b in scores), default=None),
            "seconds": {who: seconds for who, (seconds, _) in made.items()},
            "speedup": made["plain"][0] / made["ours"][0],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--task", nargs="+", default=[], help="compare with lm-eval on NAME:LIMIT instead")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lm = load("smollm2-135m-instruct")
    if options.task:
        show(against_lm_eval(lm, options.task, options.data_dir), options.json)
        return
    own = [prompt for name in OWN for prompt in load_prompts(name, "benign")]
    prompts = [own[i * len(own) // options.prompts] for i in range(options.prompts)]
    judge = RulesJudge()
    with progress.shown(), tempfile.TemporaryDirectory() as folder:
        plainly(lm, prompts[0], 4)  # the first call of a process is slower
        start = time.perf_counter()
        with progress.track("demur eval", len(prompts), "prompts") as advance:
            ours = Completions(Path(folder) / "completions.jsonl").complete(
                lm, prompts, SteeringSpec(), {}, SAFETY_SYSTEM_PROMPT, options.tokens, options.batch_size, advance
            )
            verdicts = [judge.judge(prompt, one) for prompt, one in zip(prompts, ours, strict=True)]
        ours_seconds = time.perf_counter() - start
        start = time.perf_counter()
        theirs, others = [], []
        with progress.track("plain loop", len(prompts), "prompts") as advance:
            for prompt in prompts:
                theirs.append(plainly(lm, prompt, options.tokens))
                others.append(judge.judge(prompt, theirs[-1]))
                advance(1)
        plain_seconds = time.perf_counter() - start
    result = {
        "speedup": plain_seconds / ours_seconds,
        "prompts": len(prompts),
        "tokens": options.tokens,
        "seconds": {"ours": ours_seconds, "plain": plain_seconds},
        "same_text": sum(a.text == b.text for a, b in zip(ours, theirs, strict=True)),
        "same_label": sum(a.label == b.label for a, b in zip(verdicts, others, strict=True)),
    }
    show(result, options.json)


def show(result: dict[str, Any], as_json: bool) -> None:
    """One JSON line, or a line for each figure."""
    if as_json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:12} {json.dumps(value)}")


if __name__ == "__main__":
    main()
