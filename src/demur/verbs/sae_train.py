"""`demur sae train`: chat text -> residuals on disk -> SAE, its card and its held-out measures."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from demur import progress
from demur.errors import InputError, RunExistsError
from demur.eval.reconstruction import ce_recovered
from demur.lm.harvest import Shards, harvest
from demur.lm.hookpoints import block_at, parse_hookpoint
from demur.lm.load import LanguageModel, load
from demur.record import provenance, read_json, storage, to_json, whole_file, write_json, write_text
from demur.sae.metrics import measure
from demur.sae.store import SaeConfig, SaeModel, load_sae, save_sae
from demur.sae.topk import TopKSae
from demur.sae.train import State, StepReport, train
from demur.types import stable_hash
from demur.verbs.config import SaeTrain
from demur.verbs.documents import documents

_CHECKPOINT_STEPS = 200
_CE_TEXTS = 64
_MADE = ("commit", "dirty", "versions", "started", "command")
"""What a card says of how its SAE was made."""


def sae_train(config: SaeTrain) -> dict[str, Any]:
    """Train the SAE that `config` describes and return its `cfg.json` with its hash.

    Harvest and training go on where an interrupted call stopped, to the same weights.
    """
    work = config.work or config.out / "work"
    settings = {k: v for k, v in to_json(config).items() if k not in ("json", "out", "work")}
    made = provenance()
    if config.device == "auto":
        raise InputError("sae train needs one device for model and SAE; give cpu, cuda or cuda:1")
    lm = load(config.model, config.dtype, config.device)
    hookpoint = parse_hookpoint(config.hookpoint)
    block_at(lm.model, hookpoint)
    texts, sources = documents(lm, config.data, config.context, config.max_tokens, config.train.seed)
    _claim(work, settings)
    n_heldout = max(1, round(len(texts) * config.heldout))
    heldout, trained = texts[:n_heldout], texts[n_heldout:]
    if not trained:
        raise InputError(f"{len(texts)} documents leave none to train on; give more text")
    progress.say(f"{len(trained)} documents to train on, {len(heldout)} held out")
    shards = Shards(
        work / "train",
        harvest(lm, hookpoint, trained, work / "train"),
        config.train.batch_size,
        config.train.seed,
    )
    held = Shards(work / "heldout", harvest(lm, hookpoint, heldout, work / "heldout"), 1, 0)
    sae = _train(config, work, shards)
    dtype = torch.float16 if config.half else torch.float32
    made_for = SaeModel(lm.name, lm.fingerprint, lm.n_blocks)
    training = {**_training(config, lm, sources, shards, held), **{key: made[key] for key in _MADE}}
    blank = SaeConfig(sae.d_in, sae.d_sae, sae.k, str(hookpoint), made_for, training=training)
    save_sae(config.out, sae, blank, dtype)
    # measured on what was stored, so that half precision is in the numbers
    stored = load_sae(config.out).sae.to(config.device)
    metrics = measure(stored, held).metrics
    # rare latents may be silent on the little text held out: dead is silent on all text
    on_all = measure(stored, chain(shards, held))
    everywhere, sae.reference = on_all.metrics, on_all.reference
    recovered = ce_recovered(lm, stored, hookpoint, heldout[:_CE_TEXTS])
    numbers = {
        "fvu": metrics.fvu,
        "l0": metrics.l0,
        "tokens": metrics.tokens,
        "fvu_training_text": everywhere.fvu,
        "dead": everywhere.dead,
        "dead_tokens": everywhere.tokens,
        "unit": stored.unit,
        **{k: v for k, v in recovered._asdict().items() if k != "tokens"},
    }
    final = SaeConfig(sae.d_in, sae.d_sae, sae.k, str(hookpoint), made_for, training=training, metrics=numbers)
    save_sae(config.out, sae, final, dtype)
    write_text(config.out / "README.md", _card(final))
    return {**to_json(final), "hash": load_sae(config.out).hash, "path": str(config.out)}


def _claim(work: Path, settings: dict[str, Any]) -> None:
    path = work / "settings.json"
    if path.exists() and read_json(path) != settings:
        raise RunExistsError(f"{work} holds the work of another training run; give another --work or --out folder")
    write_json(path, settings)


def _train(config: SaeTrain, work: Path, shards: Shards) -> TopKSae:
    checkpoint = work / "checkpoint.safetensors"
    total = shards.steps_per_epoch * config.train.epochs
    resume = _load_checkpoint(checkpoint)
    log = work / "train.jsonl"
    with progress.track("train", total, "steps") as advance:
        advance(resume.step if resume else 0)

        def on_step(report: StepReport, state: Any) -> None:
            advance(1)
            if report.step % 50 == 0 or report.step == total:
                with storage(log), log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(report._asdict()) + "\n")
            if report.step % _CHECKPOINT_STEPS == 0 or report.step == total:
                done: State = state()
                with whole_file(checkpoint) as temporary:
                    save_file(done.tensors, temporary, metadata={"step": str(done.step)})

        return train(shards.batches, shards.sample().to(config.device), total, config.train, resume, on_step)


def _load_checkpoint(path: Path) -> State | None:
    from safetensors import safe_open

    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
    return State(step, load_file(path))


def _training(
    config: SaeTrain, lm: LanguageModel, sources: dict[str, int], shards: Shards, held: Shards
) -> dict[str, Any]:
    return {
        "tokens": shards.tokens,
        "passes": config.train.epochs,
        "tokens_left_out": round(shards.left_out, 5),
        "heldout_tokens": held.tokens,
        "documents_by_source": sources,
        "data": {path.name: stable_hash(path.read_text(encoding="utf-8")) for path in config.data},
        "weights": lm.origin,
        "settings": to_json(config.train),
        "context": config.context,
        "stored": "float16" if config.half else "float32",
    }


def _card(config: SaeConfig) -> str:
    """A README for the SAE folder from its `cfg.json`."""
    training, metrics = config.training, config.metrics
    sources = "\n".join(f"| {name} | {count:,} |" for name, count in training["documents_by_source"].items())
    return f"""# SAE of {config.model.name}, {config.hookpoint}

Top-k sparse autoencoder, {config.d_sae:,} latents over a width of {config.d_in}, k = {config.k}, stored in \
{training["stored"]}. Trained by `{training["command"]}` at commit `{training["commit"] or "unknown"}` on \
{training["tokens"]:,} tokens x {training["passes"]} passes (seed {training["settings"]["seed"]}), \
{training["started"]}.

One latent unit moves the residual by {metrics["unit"]:.3f} along a decoder row.

| held out, as stored | |
|---|---|
| FVU | {metrics["fvu"]:.4f} |
| L0 | {metrics["l0"]:.1f} |
| FVU on the training text | {metrics["fvu_training_text"]:.4f} |
| latents active on none of {metrics["dead_tokens"]:,.0f} tokens | {metrics["dead"]:.2%} |
| cross entropy, nats a token: model / with reconstruction / residual zeroed | {metrics["ce"]:.3f} / \
{metrics["ce_sae"]:.3f} / {metrics["ce_zero"]:.3f} |
| CE recovered | {metrics["ce_recovered"]:.4f} |
| tokens left out for a massive norm | {training["tokens_left_out"]:.2%} |

| source | documents |
|---|---|
{sources}
"""
