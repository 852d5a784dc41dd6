"""SAE fixtures written as dictionary_learning's `trainSAE` writes them, one for each dict_class.

    $(python scripts/peer_environment.py dictionary_learning) scripts/sae_fixtures/by_dictionary_learning.py OUT

Expected results come from the class's own `from_pretrained` on the file as stored. A backup {"step", "ae", ...} is
written as the library's later versions do, and expected to equal its inner dictionary after `scale_biases`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

# ruff: noqa: E402
sys.modules["torchvision"] = None  # type: ignore[assignment]  # pulled in unused, and often built for another torch

from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from fixture import D_IN, D_SAE, Coder, K, expect, main, tensors
from torch import Tensor

CLASSES: dict[str, tuple[Any, str]] = {
    "AutoEncoder": (AutoEncoder, "relu"),
    "AutoEncoderNew": (AutoEncoderNew, "relu"),
    "GatedAutoEncoder": (GatedAutoEncoder, "gated"),
    "AutoEncoderTopK": (AutoEncoderTopK, "topk"),
    "BatchTopKSAE": (BatchTopKSAE, "batchtopk"),
    "MatryoshkaBatchTopKSAE": (MatryoshkaBatchTopKSAE, "batchtopk"),
    "JumpReluAutoEncoder": (JumpReluAutoEncoder, "jumprelu"),
}
THEIRS = {
    "encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "bias": "b_dec", "b_dec": "b_dec",
    "decoder.bias": "b_dec", "decoder_bias": "b_dec", "gate_bias": "b_enc", "mag_bias": "b_mag", "r_mag": "r_mag",
    "W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "threshold": "threshold",
}  # fmt: skip


def filled(name: str, variant: str) -> Any:
    """An SAE of the class `name` with random weights."""
    kind = CLASSES[name][0]
    more = {"k": K} if "TopK" in name else {}
    if "Matryoshka" in name:
        more["group_sizes"] = [9, D_SAE - 9]  # type: ignore[assignment]
    sae, w = kind(D_IN, D_SAE, **more), tensors(variant)
    with torch.no_grad():
        for key, value in sae.state_dict().items():
            if key in THEIRS:
                source = w[THEIRS[key]]
                source = source.T if key.endswith(".weight") else source
                value.copy_(source if value.ndim else torch.tensor(0.6))
    return sae


def config(name: str, module: str = "resid_post_layer_3", io: str = "out") -> str:
    trainer = {"trainer_class": "T", "dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3}
    trainer |= {"lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": module}
    trainer |= {"k": K} if "TopK" in name else {}
    return json.dumps({"trainer": trainer, "buffer": {"d_submodule": D_IN, "io": io, "ctx_len": 128}})


def coder_of(name: str, file: Path) -> Coder:
    sae = CLASSES[name][0].from_pretrained(file)

    def decode(latents: Tensor) -> Tensor:
        found: Tensor = sae.decode(latents)
        return found

    return sae.encode, decode


def write(out: Path) -> None:
    home = out / "dictionary_learning"
    about: dict[str, Any] = {"hookpoint": "layers.3.resid_post", "model": "EleutherAI/pythia-70m-deduped"}
    for name, (_, architecture) in CLASSES.items():
        folder = home / name
        folder.mkdir(parents=True)
        torch.save({key: value.cpu() for key, value in filled(name, name).state_dict().items()}, folder / "ae.pt")
        (folder / "config.json").write_text(config(name))
        k = K if "TopK" in name else 0
        expect(folder, coder_of(name, folder / "ae.pt"), architecture=architecture, k=k, **about)

    # a step of the training, of an MLP; the config is one folder up
    folder = home / "checkpoint"
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(filled("AutoEncoderTopK", "checkpoint").state_dict(), folder / "checkpoints/ae_100.pt")
    (folder / "config.json").write_text(config("AutoEncoderTopK", "mlp_layer_3"))
    file = folder / "checkpoints/ae_100.pt"
    expect(folder, coder_of("AutoEncoderTopK", file), architecture="topk", k=K, path="checkpoints/ae_100.pt",
           hookpoint="mlp_layer_3", model=about["model"])  # fmt: skip

    # a backup of training on x / 2.5, before the biases are scaled
    folder = home / "backup"
    folder.mkdir()
    sae = filled("BatchTopKSAE", "backup")
    backup = {"step": 7, "ae": sae.state_dict(), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    torch.save({**backup, "config": {"k": K}, "norm_factor": 2.5}, folder / "ae.pt")
    (folder / "config.json").write_text(config("BatchTopKSAE"))
    sae.scale_biases(2.5)
    expect(folder, (sae.encode, sae.decode), architecture="batchtopk", k=K, **about)

    # before training sets it, the threshold is -1
    folder = home / "threshold_unset"
    folder.mkdir()
    sae = filled("BatchTopKSAE", "threshold_unset")
    sae.threshold.fill_(-1.0)
    torch.save(sae.state_dict(), folder / "ae.pt")
    (folder / "config.json").write_text(config("BatchTopKSAE"))
    expect(folder, coder_of("BatchTopKSAE", folder / "ae.pt"), architecture="batchtopk", k=K, notes=1, **about)


def reopen(folder: Path) -> Coder:
    raise SystemExit("demur writes no files of dictionary_learning")


if __name__ == "__main__":
    main(write, reopen, "dictionary_learning", __doc__)
