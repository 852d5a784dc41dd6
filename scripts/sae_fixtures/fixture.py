"""What the fixture scripts share. Runs in the environment of each library, so it imports torch and safetensors only.

A fixture is a folder LIBRARY/VARIANT with the SAE as its library leaves it and `expected.safetensors`: x [8, d_in],
latents [8, d_sae] and reconstruction [8, d_in], float32, and in its metadata where the SAE lies and what it is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

D_IN, D_SAE, K = 10, 30, 5
Coder = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""encode [n, d_in] -> [n, d_sae], and decode back, called one after the other."""


def generator(name: str) -> torch.Generator:
    """Seeded by the variant's name."""
    return torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)


def residuals(name: str) -> Tensor:
    """x [8, d_in] far from the origin, of unequal norms."""
    g = generator("x" + name)
    return torch.randn(8, D_IN, generator=g) * torch.linspace(1, 5, 8).unsqueeze(1) + torch.linspace(-3, 4, D_IN)


def tensors(name: str, d_sae: int = D_SAE) -> dict[str, Tensor]:
    """Random weights in which a transposition, a norm taken for 1 or a forgotten bias shows."""
    g = generator(name)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    norms = torch.rand(d_sae, 1, generator=g) * 1.5 + 0.4
    return {
        "W_enc": randn(D_IN, d_sae) * 0.3,
        "b_enc": randn(d_sae) * 0.2,
        "W_dec": torch.nn.functional.normalize(randn(d_sae, D_IN), dim=1) * norms,
        "b_dec": randn(D_IN),
        "threshold": torch.rand(d_sae, generator=g) + 0.1,
        "b_mag": randn(d_sae) * 0.3,
        "r_mag": randn(d_sae) * 0.2,
    }


def expect(
    folder: Path, coder: Coder, *, architecture: str, hookpoint: str, model: str = "", path: str = "", k: int = 0,
    input_scale: float | None = None, notes: int = 0, oracle: str = "",
) -> None:  # fmt: skip
    """Write `expected.safetensors` into `folder`, whose SAE lies at `path` in it. `notes`: how many a reader makes."""
    encode, decode = coder
    x = residuals(folder.name)
    with torch.no_grad():
        latents = encode(x.clone())
        found = {"x": x, "latents": latents, "reconstruction": decode(latents)}
    about = {"architecture": architecture, "hookpoint": hookpoint, "model": model, "path": path, "k": k}
    about |= {"input_scale": input_scale, "notes": notes, "oracle": oracle}
    share = float((latents > 0).float().mean())
    assert 0.02 < share < 0.9, f"{folder}: {share:.0%} of latents are active, which tests little"
    save(folder / "expected.safetensors", found, {"about": json.dumps(about, sort_keys=True)})


def save(file: Path, values: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors as safetensors, float32 where they are float."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().float().contiguous() for name, value in values.items()}, file, metadata)


def formula(
    w: dict[str, Tensor], activation: Callable[[Tensor], Tensor], scale: float = 1.0, subtract: bool = False
) -> Coder:
    """An explicit coder: activation((s x - b_dec) W_enc + b_enc), and (f W_dec + b_dec) / s."""

    def encode(x: Tensor) -> Tensor:
        return activation((x * scale - (w["b_dec"] if subtract else 0)) @ w["W_enc"] + w["b_enc"])

    return encode, lambda latents: (latents @ w["W_dec"] + w["b_dec"]) / scale


def main(write: Callable[[Path], None], reopen: Callable[[Path], Coder], library: str, about: str | None) -> None:
    """The command line of a script: write every variant, or open what demur wrote for this library."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where LIBRARY/VARIANT folders go")
    parser.add_argument("--reopen", type=Path, help="a folder of SAEs that demur wrote, each with inputs.safetensors")
    given = parser.parse_args()
    if given.reopen is None:
        write(given.out)
        return
    for inputs in sorted(given.reopen.rglob("inputs.safetensors")):
        coder, x = reopen(inputs.parent), load_file(inputs)["x"]
        with torch.no_grad():
            latents = coder[0](x.clone())
            found = {"latents": latents, "reconstruction": coder[1](latents)}
        save(given.out / library / inputs.parent.name / "theirs.safetensors", found)


def dense(values: Tensor, indices: Tensor, d_sae: int) -> Tensor:
    """[n, d_sae] from the k active latents of each row."""
    return torch.zeros(len(values), d_sae).scatter(1, indices, values)


def shape(value: Tensor) -> Sequence[int]:
    """Its shape as plain numbers."""
    return list(value.shape)
