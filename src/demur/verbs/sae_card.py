"""The card of a trained SAE: what it is, how it was made and how good it is, from its `cfg.json`."""

from __future__ import annotations

from demur.lm.token_types import TYPES
from demur.sae.store import SaeConfig

_KINDS = {
    "topk": "Top-k",
    "batchtopk": "Batch-top-k",
    "matryoshka": "Matryoshka batch-top-k",
    "jumprelu": "JumpReLU",
}


def card(config: SaeConfig) -> str:
    """A README for the folder of a trained SAE."""
    training, metrics = config.training, config.metrics
    sources = "\n".join(f"| {name} | {count:,} |" for name, count in training["documents_by_source"].items())
    types = "\n".join(
        f"| FVU, {name} tokens | {metrics[f'fvu_{name}']:.4f} |" for name in TYPES if f"fvu_{name}" in metrics
    )
    return f"""# SAE of {config.model.name}, {config.hookpoint}

{_KINDS[training["trained_as"]]} sparse autoencoder, {config.d_sae:,} latents over a width of {config.d_in}, \
k = {config.k}, stored in {training["stored"]}. Trained by `{training["command"]}` at commit \
`{training["commit"] or "unknown"}` on {training["tokens"]:,} tokens x {training["passes"]} passes \
(seed {training["settings"]["seed"]}), {training["started"]}.

One latent unit moves the residual by {metrics["unit"]:.3f} along a decoder row.

| held out, as stored | |
|---|---|
| FVU | {metrics["fvu"]:.4f} |
{types}
| L0 | {metrics["l0"]:.1f} |
| mean length of reconstructions over that of residuals | {metrics["l2_ratio"]:.4f} |
| tokens without an active latent | {metrics["zero_share"]:.2%} |
| FVU on the training text | {metrics["fvu_training_text"]:.4f} |
| latents active on none of {metrics["dead_tokens"]:,.0f} tokens | {metrics["dead"]:.2%} |
| cross entropy, nats a token: model / with reconstruction / residual zeroed | {metrics["ce"]:.3f} / \
{metrics["ce_sae"]:.3f} / {metrics["ce_zero"]:.3f} |
| CE recovered | {metrics["ce_recovered"]:.4f} |
| KL from the model, nats a token | {metrics["kl"]:.4f} |
| tokens left out for a massive norm | {training["tokens_left_out"]:.2%} |

| source | documents |
|---|---|
{sources}
"""
