"""How often the fast threshold path of a top-k SAE (`exact=False`) decides as the exact rank test does.

    python benchmarks/threshold_agreement.py --json

On chats of the embedded model that the SAE's threshold was not measured on: demur's own test prompts under the safety
system prompt, with the model's answers. The first token of each is left out, as steering leaves it out.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from demur.data.prompts import OWN, load_prompts, take
from demur.lm.batches import batches
from demur.lm.chat import chat_ids, with_system
from demur.lm.generate import generate
from demur.lm.load import load
from demur.lm.record import read
from demur.sae.store import load_sae
from demur.sae.topk import TopKSae
from demur.types import SAFETY_SYSTEM_PROMPT, parse_hookpoint

PROMPTS = 20
ANSWER_TOKENS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON line last")
    parser.add_argument("--latent", type=int, default=957, help="a latent to report by itself")
    chosen = parser.parse_args()
    lm, loaded = load("smollm2-135m-instruct"), load_sae("smollm2-135m-instruct")
    sae = loaded.sae
    assert isinstance(sae, TopKSae)
    assert sae.reference is not None
    place = parse_hookpoint(loaded.config.hookpoint)
    prompts = [p for name in OWN for p in take(load_prompts(name, "benign"), "test", PROMPTS)]
    rows = [chat_ids(lm, with_system(p, SAFETY_SYSTEM_PROMPT)) for p in prompts]
    counts = torch.zeros(4)  # tokens and latents with p > 0; both active; exact only; fast only
    own = torch.zeros(4)
    missed = added = moved = 0.0
    tokens = 0
    with torch.no_grad():
        for batch in batches([len(row) for row in rows], 20):
            answers = generate(lm, [rows[i] for i in batch], ANSWER_TOKENS)
            for i, answer in zip(batch, answers, strict=True):
                x = read(lm.model, place, torch.tensor([[*rows[i], *answer.ids]])).residual[0, 1:]
                p = sae.preactivations(x)
                exact, fast = sae.encode(x) > 0, (p >= sae.reference.threshold) & (p > 0)
                parts = (p > 0, exact & fast, exact & ~fast, ~exact & fast)
                counts += torch.tensor([float(part.sum()) for part in parts])
                own += torch.tensor([float(part[:, chosen.latent].sum()) for part in parts])
                missed += float(p[exact & ~fast].sum())
                added += float(p[~exact & fast].sum())
                moved += float(p[exact].sum())
                tokens += len(x)
    positive, both, only_exact, only_fast = counts.tolist()
    result: dict[str, Any] = {
        "tokens": tokens,
        "threshold": float(sae.reference.threshold),
        "agreement": 1 - (only_exact + only_fast) / (tokens * sae.d_sae),
        "agreement_where_positive": 1 - (only_exact + only_fast) / positive,
        "active_found": both / (both + only_exact),
        "found_active": both / (both + only_fast),
        "activation_wrong": (missed + added) / moved,
        f"latent_{chosen.latent}": dict(
            zip(("positive", "both", "exact_only", "fast_only"), own.int().tolist(), strict=True)
        ),
    }
    print(json.dumps(result) if chosen.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
