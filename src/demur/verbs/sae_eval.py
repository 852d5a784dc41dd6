"""`demur sae eval`: an SAE's FVU, L0, dead share and CE recovered on text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demur import progress
from demur.data.prompts import OWN, load_prompts
from demur.errors import InputError
from demur.eval.reconstruction import ce_recovered
from demur.lm.batches import batches, pad
from demur.lm.chat import chat_ids, with_system
from demur.lm.generate import generate
from demur.lm.harvest import MASSIVE
from demur.lm.hookpoints import device_at, parse_hookpoint
from demur.lm.load import LanguageModel, load
from demur.lm.record import read
from demur.record import to_json
from demur.sae.metrics import measure
from demur.sae.store import LoadedSae, check_fits, load_sae
from demur.types import SAFETY_SYSTEM_PROMPT, Hookpoint
from demur.verbs.config import SaeEval
from demur.verbs.documents import documents

_ANSWER_TOKENS = 48
_PROMPTS = 32
"""Prompts of each of demur's own sets in the default text, under both system prompts."""
_CE_TEXTS = 64


def sae_eval(config: SaeEval) -> dict[str, Any]:
    """Measure the SAE. Returns `metrics` (fvu, l0, dead, tokens, ce_recovered, ...), and what was measured on what.

    `dead` is the share of latents active on none of the tokens looked at: on little text it overstates death.
    Raises as `load_sae`, `load` and `check_fits` do.
    """
    loaded, lm, hookpoint = with_its_model(config.sae, config.model, config.device)
    if config.data:
        rows = documents(lm, config.data, config.context, config.max_tokens, config.seed).rows
        text = ", ".join(path.name for path in config.data)
    else:
        rows = _own_text(lm)
        text = "demur's own prompts, answered by the model under both system prompts"
    if not rows:
        raise InputError("the text files hold no document of at least two tokens; give more text")
    counts = {"seen": 0, "kept": 0}
    metrics = measure(loaded.sae, residuals(lm, hookpoint, rows, counts)).metrics
    recovered = ce_recovered(lm, loaded.sae, hookpoint, rows[:_CE_TEXTS])
    numbers = {
        **metrics._asdict(),
        "tokens_left_out": 1 - counts["kept"] / counts["seen"],
        **{key: value for key, value in recovered._asdict().items() if key != "tokens"},
    }
    return {
        "sae": loaded.path,
        "hash": loaded.hash,
        "model": lm.name,
        "weights": lm.origin,
        "hookpoint": str(hookpoint),
        "text": text,
        "metrics": numbers,
        "card": to_json(loaded.config)["metrics"],
    }


def with_its_model(sae: str | Path, model: str, device: str) -> tuple[LoadedSae, LanguageModel, Hookpoint]:
    """The SAE, `model` or else the one it was trained on, and its hookpoint; the SAE is where that block runs."""
    loaded = load_sae(sae)
    lm = load(model or _model_name(loaded.config.model.name), device=device)
    hookpoint = parse_hookpoint(loaded.config.hookpoint)
    place = device_at(lm.model, hookpoint)
    check_fits(loaded, lm.name, lm.fingerprint, lm.d_model, lm.n_blocks)
    loaded.sae.to(place)
    return loaded, lm, hookpoint


def _model_name(trained_on: str) -> str:
    from demur.lm import embedded

    return embedded.NAME if trained_on == embedded.HUB_ID else trained_on


def _own_text(lm: LanguageModel) -> list[list[int]]:
    """Test prompts of demur's own sets with the model's answers: text that everyone has and no SAE was trained on."""
    prompts = [p for name in OWN for p in load_prompts(name, "benign") if p.split == "test"]
    prompts = prompts[:: max(1, len(prompts) // (_PROMPTS * len(OWN)))]
    asked = [chat_ids(lm, with_system(p, system)) for p in prompts for system in ("", SAFETY_SYSTEM_PROMPT)]
    rows: list[list[int]] = []
    with progress.track("answers", len(asked), "prompts") as advance:
        for batch in batches([len(row) for row in asked], 32):
            answers = generate(lm, [asked[i] for i in batch], _ANSWER_TOKENS)
            rows += [[*asked[i], *answer.ids] for i, answer in zip(batch, answers, strict=True)]
            advance(len(batch))
    return rows


def residuals(
    lm: LanguageModel, hookpoint: Hookpoint, rows: list[list[int]], counts: dict[str, int]
) -> Iterator[Tensor]:
    """Residuals without massive tokens, which no SAE is trained on; `counts` says how many were seen and kept."""
    limit: float | None = None
    with progress.track("residuals", len(rows), "texts") as advance:
        for batch in batches([len(row) for row in rows], 8):
            padded = pad(lm, [rows[i] for i in batch], side="right")
            residual = read(lm.model, hookpoint, padded.ids, padded.mask).residual[padded.mask.bool()].float()
            norms = residual.norm(dim=-1)
            limit = MASSIVE * float(torch.median(norms)) if limit is None else limit
            kept = residual[norms <= limit]
            counts["seen"] += len(residual)
            counts["kept"] += len(kept)
            yield kept
            advance(len(batch))
