"""SAE fixtures written by SAELens, and SAEs of demur opened by it.

    $(python scripts/peer_environment.py saelens) scripts/sae_fixtures/by_saelens.py OUT [--reopen FOLDER]

Every expected result comes from SAELens itself: `SAE.load_from_disk` for inference SAEs; for a training checkpoint, the
inference SAE that SAELens makes of it (scale or whitening folded, `save_inference_model`). Flat configs are those of
versions before 6, which SAELens still reads.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from fixture import D_IN, D_SAE, Coder, K, expect, main, residuals, save, tensors
from sae_lens import SAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening

warnings.simplefilter("ignore")
HOOK, MODEL = "blocks.4.hook_resid_post", "pythia-70m-deduped"
ABOUT: dict[str, Any] = {"hookpoint": "layers.4.resid_post", "model": "EleutherAI/pythia-70m-deduped"}
KINDS = {"standard": "relu", "batchtopk": "batchtopk", "matryoshka_batchtopk": "batchtopk"}
THEIRS = {"b_gate": "b_enc"}


def coder_of(folder: Path) -> Coder:
    sae = SAE.load_from_disk(folder, dtype="float32")
    return sae.encode, sae.decode


def filled(kind: tuple[type, type], variant: str, **more: Any) -> Any:
    """An SAE of SAELens with random weights."""
    metadata = SAEMetadata(model_name=MODEL, hook_name=more.pop("hook_name", HOOK), **more.pop("metadata", {}))
    sae = kind[0](kind[1](d_in=D_IN, d_sae=D_SAE, metadata=metadata, **more))
    w = tensors(variant)
    with torch.no_grad():
        for key, value in sae.state_dict().items():
            value.copy_(torch.tensor(0.8) if key == "topk_threshold" else w[THEIRS.get(key, key)])
    return sae


def inference(out: Path, variant: str, architecture: str, cfg: dict[str, Any] | None = None, **about: Any) -> None:
    """An inference SAE with the fields `cfg`; `about` differs from what its reader finds in all of them."""
    folder = out / "saelens" / variant
    filled(get_sae_class(architecture), variant, **(cfg or {})).save_model(folder)
    about = {"k": (cfg or {}).get("k", 0), **ABOUT, **about}
    expect(folder, coder_of(folder), architecture=KINDS.get(architecture, architecture), **about)


def training(out: Path, variant: str, architecture: str, scaler: ActivationScaler | None, cfg: dict[str, Any]) -> Path:
    """A training checkpoint, and what SAELens makes of it at the end of training."""
    folder = out / "saelens" / variant
    sae = filled(get_sae_training_class(architecture), variant, **cfg)
    sae.save_model(folder)
    (scaler or ActivationScaler()).save(str(folder / "activation_scaler.json"))
    ended = copy.deepcopy(sae)
    if scaler is not None and scaler.scaling_factor is not None:
        ended.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler is not None and scaler.whitening is not None:
        white = scaler.whitening
        ended.fold_activation_whitening(white.mean, white.matrix, white.inverse_matrix)
    with tempfile.TemporaryDirectory() as final:
        ended.save_inference_model(final)
        expect(folder, coder_of(Path(final)), architecture=KINDS.get(architecture, architecture), k=cfg.get("k", 0),
               oracle="SAELens's inference SAE of this checkpoint", **ABOUT)  # fmt: skip
    return folder


def whitening(variant: str) -> ActivationScaler:
    """Made by SAELens from random residuals."""
    scaler = ActivationScaler()
    data = torch.cat([residuals(f"{variant}{i}") for i in range(40)])
    scaler.estimate_whitening(D_IN, iter([data]), n_batches_for_norm_estimate=1)
    assert isinstance(scaler.whitening, ActivationWhitening)
    return scaler


def flat(out: Path, variant: str, cfg: dict[str, Any], architecture: str, k: int = 0, **more: Any) -> Path:
    """A file of a version before 6: the weights of today under a config of then."""
    folder = out / "saelens" / variant
    names = ["W_enc", "W_dec", "b_enc", "b_dec", *(["threshold"] if architecture == "jumprelu" else [])]
    save(folder / "sae_weights.safetensors", {name: tensors(variant)[name] for name in names} | more.pop("extra", {}))
    old = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cpu", "model_name": "gpt2-small"}
    (folder / "cfg.json").write_text(json.dumps({**old, **cfg}))
    about = {"hookpoint": "layers.7.resid_post", "model": "openai-community/gpt2", **more.pop("about", {})}
    sae = SAE.load_from_disk(folder, dtype="float32")
    if about.get("input_scale"):
        sae.fold_activation_norm_scaling_factor(about["input_scale"])
    expect(folder, (sae.encode, sae.decode), architecture=architecture, k=k, notes=more.pop("notes", 1), **about)
    return folder


def average_norm(out: Path) -> None:
    """One scale for all residuals, which SAELens takes from its own registry of published SAEs."""
    folder, cfg = out / "saelens/average_norm", {"normalize_activations": "expected_average_only_in"}
    filled(get_sae_class("jumprelu"), "average_norm", **cfg).save_model(folder)
    sae = SAE.load_from_disk(folder)
    sae.fold_activation_norm_scaling_factor(0.43)
    expect(folder, (sae.encode, sae.decode), architecture="jumprelu", input_scale=0.43, **ABOUT)
    inference(out, "average_norm_unknown", "jumprelu", cfg, notes=1)


def inference_of_training(out: Path) -> None:
    """What `save_inference_model` leaves: batch-top-k becomes JumpReLU, and decoder norms are folded."""
    more = {"matryoshka_batchtopk": {"matryoshka_widths": [10, D_SAE]}}
    for name, architecture in (("topk", "topk"), ("batchtopk", "jumprelu"), ("matryoshka_batchtopk", "jumprelu")):
        folder = out / "saelens" / f"{name}_inference"
        filled(get_sae_training_class(name), folder.name, k=K, **more.get(name, {})).save_inference_model(folder)
        expect(folder, coder_of(folder), architecture=architecture, k=K, **ABOUT)


def checkpoints(out: Path) -> None:
    scaled = {"normalize_activations": "expected_average_only_in"}
    white = {"normalize_activations": "covariance_whitening"}
    training(out, "standard_checkpoint_scaled", "standard", ActivationScaler(0.43), scaled)
    training(out, "topk_checkpoint_scaled", "topk", ActivationScaler(0.43), {"k": K, **scaled})
    training(out, "batchtopk_checkpoint_scaled", "batchtopk", ActivationScaler(0.43), {"k": K, **scaled})
    training(out, "topk_checkpoint_whitened", "topk", whitening("topk"), {"k": K, **white})
    unsubtracted = {"apply_b_dec_to_input": False, **white}
    training(out, "gated_checkpoint_whitened", "gated", whitening("gated"), unsubtracted)
    matryoshka = {"k": K, "matryoshka_widths": [10, D_SAE], "rescale_acts_by_decoder_norm": False}
    training(out, "matryoshka_checkpoint", "matryoshka_batchtopk", None, matryoshka)
    # of an older version: the logarithm of the threshold
    w = tensors(training(out, "jumprelu_checkpoint_log", "jumprelu", None, {}).name)
    w["log_threshold"] = w["threshold"].log()
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "log_threshold")
    save(out / "saelens/jumprelu_checkpoint_log/sae_weights.safetensors", {name: w[name] for name in names})


def flat_configs(out: Path) -> None:
    ones = {"scaling_factor": torch.ones(D_SAE)}
    flat(out, "flat_standard", {"hook_point": "blocks.7.hook_resid_post", "hook_point_head_index": None}, "relu",
         extra=ones)  # fmt: skip
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": "layer_norm"}
    flat(out, "flat_topk", {"hook_name": "blocks.8.hook_resid_pre", "architecture": "standard", **topk}, "topk", k=K)
    jump = {"architecture": "jumprelu", "apply_b_dec_to_input": False, "finetuning_scaling_factor": False}
    whole = {"model_from_pretrained_kwargs": {"center_writing_weights": False}, "sae_lens_version": "5.3.0"}
    flat(out, "flat_jumprelu", {"hook_name": "blocks.7.hook_resid_post", **jump, **whole}, "jumprelu", notes=0)
    flat(out, "flat_average_norm", {"hook_name": "blocks.7.hook_resid_post", "normalize_activations": True}, "relu",
         about={"input_scale": 0.43})  # fmt: skip


def write(out: Path) -> None:
    inference(out, "standard", "standard", {"metadata": {"prepend_bos": True, "context_size": 128}})
    inference(out, "standard_b_dec_not_subtracted", "standard", {"apply_b_dec_to_input": False})
    inference(out, "standard_layer_norm", "standard", {"normalize_activations": "layer_norm"})
    inference(out, "standard_bfloat16", "standard", {"dtype": "bfloat16"})
    head = "blocks.4.attn.hook_z"
    inference(out, "standard_one_head", "standard", {"hook_name": head, "metadata": {"hook_head_index": 2}},
              hookpoint=f"{head}.2")  # fmt: skip
    inference(out, "topk", "topk", {"k": K})
    inference(out, "topk_ranked_by_norm", "topk", {"k": K, "rescale_acts_by_decoder_norm": True})
    centred = {"seqpos_slice": [2, 100], "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    inference(out, "jumprelu", "jumprelu", {"metadata": centred}, notes=2)
    earlier = {"hook_name": "blocks.5.hook_resid_pre", "apply_b_dec_to_input": False}
    inference(out, "jumprelu_resid_pre", "jumprelu", earlier)
    inference(out, "gated", "gated")
    constant = {"apply_b_dec_to_input": False, "normalize_activations": "constant_norm_rescale"}
    inference(out, "gated_constant_norm", "gated", constant)
    inference(out, "matching_pursuit", "matching_pursuit", {"residual_threshold": 1.5}, k=D_IN)
    short = {"max_iterations": 4, "apply_b_dec_to_input": False}
    inference(out, "matching_pursuit_short", "matching_pursuit", short, k=4)
    average_norm(out)
    inference_of_training(out)
    checkpoints(out)
    flat_configs(out)
    refused(out)


def refused(out: Path) -> None:
    """An SAE that demur refuses by name: no expected results."""
    sae_class, cfg_class = get_sae_class("transcoder")
    cfg: Any = {"d_in": D_IN, "d_sae": D_SAE, "d_out": D_IN, "apply_b_dec_to_input": False}
    sae_class(cfg_class(**cfg)).save_model(out / "saelens/refused_transcoder")


if __name__ == "__main__":
    main(write, coder_of, "saelens", __doc__)
