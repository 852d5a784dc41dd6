"""SAE fixtures written by EleutherAI's sparsify, and SAEs of demur opened by it.

    $(python scripts/peer_environment.py sparsify) scripts/sae_fixtures/by_sparsify.py OUT [--reopen FOLDER]

Every expected result comes from `SparseCoder.load_from_disk` on the files as stored; the files of old versions are
those of today with the keys taken out that did not exist then.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fixture import D_IN, D_SAE, Coder, K, dense, expect, main, tensors
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor


def coder_of(folder: Path) -> Coder:
    coder = SparseCoder.load_from_disk(folder)

    def encode(x: Tensor) -> Tensor:
        found = coder.encode(x)
        return dense(found.top_acts, found.top_indices, coder.num_latents)

    def decode(latents: Tensor) -> Tensor:
        values, indices = latents.topk(coder.cfg.k)
        found: Tensor = coder.decode(values, indices)
        return found

    return encode, decode


def make(out: Path, variant: str, path: str, cfg: SparseCoderConfig, without: tuple[str, ...] = ()) -> Path:
    """One SAE, saved by the library at VARIANT/`path`."""
    coder = SparseCoder(D_IN, cfg)
    w = tensors(variant, coder.num_latents)
    with torch.no_grad():
        coder.encoder.weight.copy_(w["W_enc"].T)
        coder.encoder.bias.copy_(w["b_enc"])
        coder.W_dec.copy_(w["W_dec"])
        coder.b_dec.copy_(w["b_dec"])
    folder = out / "sparsify" / variant
    coder.save_to_disk(folder / path)
    file = folder / path / "cfg.json"
    stated = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in stated.items() if key not in without}))
    return folder


def write(out: Path) -> None:
    cfg = SparseCoderConfig(num_latents=D_SAE, k=K)
    folder = make(out, "topk", "layers.6", cfg)
    expect(folder, coder_of(folder / "layers.6"), architecture="topk", k=K, path="layers.6",
           hookpoint="layers.6.resid_post")  # fmt: skip
    # the usual file: num_latents 0 means d_in * expansion_factor; with the run's config above
    folder = make(out, "topk_num_latents_0", "run/h.3", SparseCoderConfig(expansion_factor=3, k=K))
    (folder / "run/config.json").write_text(json.dumps({"model": "gpt2", "dataset": "x"}))
    expect(folder, coder_of(folder / "run/h.3"), architecture="topk", k=K, path="run/h.3",
           hookpoint="layers.3.resid_post", model="openai-community/gpt2")  # fmt: skip
    old = ("activation", "transcode", "skip_connection", "multi_topk")
    folder = make(out, "topk_old", "layers.2/seed1", SparseCoderConfig(expansion_factor=3, k=K), old)
    expect(folder, coder_of(folder / "layers.2/seed1"), architecture="topk", k=K, path="layers.2/seed1",
           hookpoint="layers.2.resid_post")  # fmt: skip
    folder = make(out, "groupmax", "layers.6.mlp", SparseCoderConfig("groupmax", num_latents=D_SAE, k=6))
    expect(folder, coder_of(folder / "layers.6.mlp"), architecture="groupmax", k=6, path="layers.6.mlp",
           hookpoint="layers.6.mlp")  # fmt: skip
    # refused by demur: no expected results
    make(out, "refused_transcode", "layers.1", SparseCoderConfig(num_latents=D_SAE, k=K, transcode=True))
    make(out, "refused_skip", "layers.1", SparseCoderConfig(num_latents=D_SAE, k=K, skip_connection=True))


if __name__ == "__main__":
    main(write, coder_of, "sparsify", __doc__)
