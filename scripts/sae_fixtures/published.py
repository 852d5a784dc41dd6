"""SAE fixtures in the layouts of published SAEs: Gemma Scope 1 and 2, Llama Scope, Qwen Scope, Goodfire, DeepSeek-R1.

    $(python scripts/peer_environment.py saelens) scripts/sae_fixtures/published.py OUT

Their trainers are not public, so the files are written here, at the paths of their repositories. Expected results come
from SAELens's own loaders (its downloads answered from these files) where those are right, else from an explicit
formula; each fixture's `oracle` says which. SAELens is not asked for Gemma Scope's embedding SAEs (it leaves b_dec
unscaled), Llama Scope with decoder norms other than 1 (it does not use them), and Neel Nanda's (nor their k).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fixture import D_IN, D_SAE, Coder, K, expect, formula, main, save, shape, tensors
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.registry import get_sae_class
from safetensors.torch import load_file
from torch import Tensor

SIZES = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"}


def by_saelens(root: Path, loader: Callable[..., Any], repo: str, sub: str, scale: float = 1.0) -> Coder:
    """The coder that SAELens makes of the files of `repo` under `root`, downloads answered from there."""

    def download(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        file = root / repo_id / subfolder / filename
        if not file.is_file():
            raise loaders.EntryNotFoundError(f"{file} is not there")
        return str(file)

    def shapes(repo_id: str, filename: str) -> dict[str, Any]:
        return {name: shape(value) for name, value in load_file(root / repo_id / filename).items()}

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = download, shapes
    cfg, state, _ = loader(repo_id=repo, folder_name=sub, device="cpu", force_download=False, cfg_overrides=dict(SIZES))
    cfg = loaders.handle_config_defaulting({**cfg, "device": "cpu"})
    sae_class, cfg_class = get_sae_class(cfg["architecture"])
    sae: SAE[Any] = sae_class(cfg_class.from_dict(cfg))
    sae.load_state_dict(state)
    if cfg["normalize_activations"] == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(scale)
    return sae.float().encode, sae.decode


def jump(threshold: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda p: p.relu() * (p > threshold)


def picked(variant: str, names: tuple[str, ...] = ("W_enc", "b_enc", "W_dec", "b_dec")) -> dict[str, Tensor]:
    return {name: tensors(variant)[name] for name in names}


def linear(w: dict[str, Tensor], encoder: str, decoder: str) -> dict[str, Tensor]:
    """The same under the names of two `nn.Linear`."""
    return {
        f"{encoder}.weight": w["W_enc"].T.contiguous(),
        f"{encoder}.bias": w["b_enc"],
        f"{decoder}.weight": w["W_dec"].T.contiguous(),
        f"{decoder}.bias": w["b_dec"],
    }


def save_npz(file: Path, w: dict[str, Tensor]) -> None:
    arrays: dict[str, Any] = {name: w[name].numpy() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    np.savez(file, **arrays)


def gemma_scope(out: Path) -> None:
    for variant, site, hook in (("residual", "res", "layers.3.resid_post"), ("mlp", "mlp", "blocks.3.hook_mlp_out")):
        folder, repo = out / "gemma_scope" / variant, f"google/gemma-scope-2b-pt-{site}"
        sub = "layer_3/width_16k/average_l0_71"
        (folder / repo / sub).mkdir(parents=True)
        w = tensors(variant)
        save_npz(folder / repo / sub / "params.npz", w)
        coder = by_saelens(folder, loaders.gemma_2_sae_huggingface_loader, repo, sub)
        expect(folder, coder, architecture="jumprelu", hookpoint=hook, model="google/gemma-2-2b", oracle="SAELens",
               path=f"{repo}/{sub}")  # fmt: skip
    folder, sub = out / "gemma_scope/embedding", "google/gemma-scope-9b-it-res/embedding/width_4k/average_l0_6"
    (folder / sub).mkdir(parents=True)
    w = tensors("embedding")
    w["W_enc"] = w["W_enc"] * 4
    save_npz(folder / sub / "params.npz", w)
    expect(folder, formula(w, jump(w["threshold"]), D_IN**-0.5), architecture="jumprelu", hookpoint="hook_embed",
           model="google/gemma-2-9b-it", path=f"{sub}/params.npz", oracle="formula")  # fmt: skip


def gemma_scope_2(out: Path) -> None:
    repo = "google/gemma-scope-2-1b-pt"
    sites = (("resid_post", "output", "layers.13.resid_post"), ("attn_out", "self_attn.o_proj.input", ""))
    for site, module, hook in sites:
        folder, sub = out / "gemma_scope_2" / site, f"{site}/layer_13_width_16k_l0_medium"
        w = picked(site, ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"))
        save(folder / repo / sub / "params.safetensors", {name.lower(): value for name, value in w.items()})
        place = f"model.layers.13.{module}"
        if site == "resid_post":  # the other goes without, as some do
            cfg = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "hf_hook_point_in": place}
            (folder / repo / sub / "config.json").write_text(json.dumps({**cfg, "width": D_SAE}))
        coder = by_saelens(folder, loaders.gemma_3_sae_huggingface_loader, repo, sub)
        expect(folder, coder, architecture="jumprelu", hookpoint=hook or place, model="google/gemma-3-1b-pt",
               oracle="SAELens", path=f"{repo}/{sub}")  # fmt: skip


def llama_scope(out: Path) -> None:
    repo, sub, norm = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L5R-8x", 11.0
    scale = D_IN**0.5 / norm
    for variant in ("unit_norms", "other_norms"):
        folder, w = out / "llama_scope" / variant, tensors(variant)
        norms = w["W_dec"].norm(dim=1)
        if variant == "unit_norms":
            w["W_dec"] = w["W_dec"] / norms.unsqueeze(1)
        save(folder / repo / sub / "checkpoints/final.safetensors", linear(w, "encoder", "decoder"))
        cfg = {"act_fn": "jumprelu", "jump_relu_threshold": 1.7, "norm_activation": "dataset-wise", "d_model": D_IN}
        cfg |= {"dataset_average_activation_norm": {"in": norm, "out": norm}, "d_sae": D_SAE, "top_k": 50}
        cfg |= {"apply_decoder_bias_to_pre_encoder": False, "sparsity_include_decoder_norm": True}
        hook = {"hook_point_in": "blocks.5.hook_resid_post", "hook_point_out": "blocks.5.hook_resid_post"}
        (folder / repo / sub / "hyperparams.json").write_text(json.dumps({**cfg, **hook}))
        coder, oracle = formula(w, jump(1.7 * scale / norms), scale), "formula"
        if variant == "unit_norms":
            coder = by_saelens(folder, loaders.llama_scope_sae_huggingface_loader, repo, sub, scale)
            oracle = "SAELens"
        expect(folder, coder, architecture="jumprelu", hookpoint="layers.5.resid_post", oracle=oracle,
               model="meta-llama/Llama-3.1-8B", path=f"{repo}/{sub}")  # fmt: skip
    folder, repo, sub = out / "llama_scope/distill", "fnlp/Llama-Scope-R1-Distill", "400M-Slimpajama/L5R"
    w = tensors("distill")
    file = folder / repo / sub / "sae_weights.safetensors"
    save(file, linear(w, "encoder", "decoder") | {"log_jumprelu_threshold": w["threshold"].log()})
    cfg = {"d_model": D_IN, "expansion_factor": D_SAE // D_IN, **hook}
    (folder / repo / sub / "config.json").write_text(json.dumps(cfg))
    coder = by_saelens(folder, loaders.llama_scope_r1_distill_sae_huggingface_loader, repo, sub, 0.6)
    expect(folder, coder, architecture="jumprelu", hookpoint="layers.5.resid_post", oracle="SAELens", input_scale=0.6,
           model="meta-llama/Llama-3.1-8B", path=f"{repo}/{sub}")  # fmt: skip


def lone_files(out: Path) -> None:
    home = out / "state_dict"
    lone = (
        ("goodfire", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth",
         ("encoder_linear", "decoder_linear"), loaders.get_goodfire_huggingface_loader, "layers.19.resid_post",
         "meta-llama/Llama-3.1-8B-Instruct"),
        ("deepseek", "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19", "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
         ("encoder", "decoder"), loaders.deepseek_r1_sae_huggingface_loader, "layers.19.resid_post",
         "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    )  # fmt: skip
    for variant, repo, file, names, loader, hook, model in lone:
        folder = home / variant
        (folder / repo).mkdir(parents=True)
        torch.save(linear(picked(variant), *names), folder / repo / file)
        expect(folder, by_saelens(folder, loader, repo, file), architecture="relu", hookpoint=hook, model=model,
               path=f"{repo}/{file}", oracle="SAELens")  # fmt: skip
    # the same as safetensors
    folder, file = home / "goodfire_safetensors", "Goodfire/Some-Model-SAE-l7.safetensors"
    w = picked(folder.name)
    save(folder / file, linear(w, "encoder_linear", "decoder_linear"))
    expect(folder, formula(w, torch.relu), architecture="relu", hookpoint="layers.7.resid_post", model="Some-Model",
           path=file, oracle="formula")  # fmt: skip
    folder, repo = home / "qwen_scope", f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
    (folder / repo).mkdir(parents=True)
    w = picked(folder.name)
    theirs = {name: value.T.contiguous() if value.ndim == 2 else value for name, value in w.items()}
    torch.save(theirs, folder / repo / "layer12.sae.pt")
    coder = by_saelens(folder, loaders.qwen_scope_sae_huggingface_loader, repo, "layer12.sae.pt")
    expect(folder, coder, architecture="topk", k=K, hookpoint="layers.12.resid_post", model="Qwen/Qwen3-1.7B-Base",
           path=f"{repo}/layer12.sae.pt", oracle="SAELens")  # fmt: skip
    folder = home / "nanda"
    folder.mkdir()
    w = picked(folder.name)
    torch.save(w, folder / "25.pt")
    cfg = {"act_size": D_IN, "dict_size": D_SAE, "act_name": "blocks.1.hook_resid_pre", "model_name": "gpt2-small"}
    (folder / "25_cfg.json").write_text(json.dumps(cfg))
    expect(folder, formula(w, torch.relu, subtract=True), architecture="relu", hookpoint="layers.0.resid_post",
           model="openai-community/gpt2", path="25.pt", oracle="formula")  # fmt: skip


def write(out: Path) -> None:
    gemma_scope(out)
    gemma_scope_2(out)
    llama_scope(out)
    lone_files(out)


def reopen(folder: Path) -> Coder:
    raise SystemExit("demur writes none of these")


if __name__ == "__main__":
    main(write, reopen, "published", __doc__)
