"""`demur sae inspect`: an SAE that fits is said to fit; broken in each classic way, the way is named.

The SAE is a codebook: one atom for each token's residual, sixteen copies of each, so that exactly the nearest atom is
active in its top 16. It reconstructs its own text exactly and any other reading of it badly.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_study import save_model
from torch import Tensor

from demur.cli.main import main
from demur.errors import InputError, MismatchError
from demur.lm.batches import pad
from demur.lm.load import LanguageModel, load
from demur.lm.record import read
from demur.sae.base import Normalize, Sae
from demur.sae.store import SaeConfig, SaeModel, save_sae
from demur.sae.thresholded import ReluSae
from demur.sae.topk import TopKSae
from demur.testing import tiny_model, tiny_sae
from demur.types import Hookpoint
from demur.verbs.config import SaeInspect
from demur.verbs.documents import some_rows
from demur.verbs.sae_inspect import Inspected, sae_inspect

K = 16
AT = Hookpoint(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    save_model(tiny_model(), folder / "model")
    turns = [[("user", f"What is {i}?"), ("assistant", f"I'm sorry, but {i * 7} cakes can't help.")] for i in range(8)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def lm(place: Path) -> LanguageModel:
    return load(str(place / "model"))


def residuals(lm: LanguageModel, place: Path, at: Hookpoint = AT, without_bos: bool = False) -> Tensor:
    rows = [row.ids for row in some_rows(lm, (place / "chat.jsonl",), 384, 3000, 0)]
    padded = pad(lm, [row[1:] for row in rows] if without_bos else rows, side="right")
    return read(lm.model, at, padded.ids, padded.mask).residual[padded.mask.bool()]


def factor(x: Tensor) -> float:
    return math.sqrt(x.shape[1]) / float(x.norm(dim=-1).mean())


def codebook(x: Tensor, normalize: Normalize = "none", subtract_b_dec: bool = True) -> TopKSae:
    """Exact on the residuals `x` [n, d_in]: p = c_i (x - b) - |c_i|^2 / 2 is largest for the nearest atom c_i + b."""
    sae = TopKSae(x.shape[1], K * len(x), K, normalize, subtract_b_dec)
    x = sae.prepare(x).x
    mean = x.mean(0) + 0.5 * x.std()
    atoms = x - mean
    half = atoms.square().sum(-1) / 2
    sae.b_dec.data = mean
    sae.W_enc.data = atoms.T.repeat_interleave(K, dim=1)
    sae.b_enc.data = (-half - (0 if subtract_b_dec else atoms @ mean)).repeat_interleave(K)
    sae.W_dec.data = (atoms / half.unsqueeze(-1) / K).repeat_interleave(K, dim=0)
    return sae.requires_grad_(False)


def as_relu(sae: Sae) -> ReluSae:
    other = ReluSae(sae.d_in, sae.d_sae)
    other.load_state_dict({**sae.state_dict(), "threshold": torch.zeros(sae.d_sae)})
    return other.requires_grad_(False)


def misread(sae: TopKSae, normalize: Normalize = "none", subtract_b_dec: bool = True) -> TopKSae:
    sae.normalize, sae.subtract_b_dec = normalize, subtract_b_dec
    return sae


def every_direction(x: Tensor) -> TopKSae:
    """Both signs of orthonormal directions: exact with ReLU, where half of the latents are active; here top-4."""
    sae = TopKSae(x.shape[1], 2 * x.shape[1], 4)
    directions = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    sae.W_dec.data = torch.cat([directions, -directions])
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    sae.b_dec.data = x.mean(0)
    return sae.requires_grad_(False)


def inspect(place: Path, lm: LanguageModel, sae: Sae, folder: Path, hookpoint: str = str(AT)) -> Inspected:
    k = sae.k if isinstance(sae, TopKSae) else 0
    made_for = SaeModel(str(place / "model"), lm.fingerprint, lm.n_blocks)
    config = SaeConfig(
        sae.d_in, sae.d_sae, k, hookpoint, made_for, sae.kind, normalize=sae.normalize,
        subtract_b_dec=sae.subtract_b_dec,
    )  # fmt: skip
    save_sae(folder / "sae", sae, config)
    return sae_inspect(SaeInspect(str(folder / "sae"), data=(place / "chat.jsonl",)))


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("subtract", [True, False])
def test_an_sae_read_as_it_was_meant_fits(
    place: Path, lm: LanguageModel, tmp_path: Path, normalize: Normalize, subtract: bool
) -> None:
    found = inspect(place, lm, codebook(residuals(lm, place), normalize, subtract), tmp_path)
    assert found.fits
    assert len(found.sentences) == 1
    assert found.sentences[0].startswith("fits layers.1.resid_post of ")
    assert found.metrics["fvu"] == pytest.approx(0, abs=1e-3)
    assert found.metrics["adds_bos"] is False
    assert {"layers.0.resid_post", "layers.2.resid_post", "without BOS"} <= set(found.alternatives)
    assert "layers.1.resid_post" not in found.alternatives


BROKEN: dict[str, tuple[Callable[[LanguageModel, Path], Sae], str]] = {
    "block": (
        lambda lm, place: codebook(residuals(lm, place, Hookpoint(2))),
        "wrong layer: layers.2.resid_post fits better; give --hookpoint layers.2.resid_post",
    ),
    "b_dec taken": (
        lambda lm, place: misread(codebook(residuals(lm, place), subtract_b_dec=False)),
        "b_dec misread: it fits better with b_dec not subtracted",
    ),
    "b_dec not taken": (
        lambda lm, place: misread(codebook(residuals(lm, place)), subtract_b_dec=False),
        "b_dec misread: it fits better with b_dec subtracted",
    ),
    "topk as relu": (
        lambda lm, place: as_relu(codebook(residuals(lm, place))),
        "activation misread: it fits better as topk k=16 than as relu",
    ),
    "relu as topk": (
        lambda lm, place: every_direction(residuals(lm, place)),
        "activation misread: it fits better as relu than as topk (L0 4)",
    ),
    "scale missing": (
        lambda lm, place: codebook(residuals(lm, place) * factor(residuals(lm, place))),
        "a scale is missing: it fits better on residuals multiplied by",
    ),
    "scale twice": (
        lambda lm, place: codebook(residuals(lm, place) / factor(residuals(lm, place))),
        "a scale is applied twice: it fits better on residuals multiplied by",
    ),
    "layer norm": (
        lambda lm, place: misread(codebook(residuals(lm, place), "layer_norm")),
        "normalisation misread: it fits better with normalize layer_norm than with none",
    ),
    "constant norm": (
        lambda lm, place: misread(codebook(residuals(lm, place), "constant_norm")),
        "normalisation misread: it fits better with normalize constant_norm than with none",
    ),
    "no norm": (
        lambda lm, place: misread(codebook(residuals(lm, place)), "constant_norm"),
        "normalisation misread: it fits better with normalize none than with constant_norm",
    ),
    "bos": (
        lambda lm, place: codebook(residuals(lm, place, without_bos=True)),
        "BOS misread: it fits better on text without BOS",
    ),
}


@pytest.mark.parametrize("way", BROKEN)
def test_each_classic_misreading_is_named(place: Path, lm: LanguageModel, tmp_path: Path, way: str) -> None:
    make, sentence = BROKEN[way]
    found = inspect(place, lm, make(lm, place), tmp_path)
    assert not found.fits
    assert len(found.sentences) == 1, found.sentences
    assert found.sentences[0].startswith(sentence)


def test_an_sae_of_something_else_does_not_fit(place: Path, lm: LanguageModel, tmp_path: Path) -> None:
    found = inspect(place, lm, tiny_sae(), tmp_path)
    assert not found.fits
    assert "no other block, b_dec, activation, scale or BOS fits better" in found.sentences[0]


def test_what_cannot_be_inspected_is_an_error(place: Path, lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the place 'blocks\.1\.hook_mlp_out', which is not the output of"):
        inspect(place, lm, tiny_sae(), tmp_path, "blocks.1.hook_mlp_out")
    with pytest.raises(MismatchError, match=r"width 16, but .* has width 32"):
        inspect(place, lm, tiny_sae(d_in=16), tmp_path)
    save_sae(tmp_path / "nameless", tiny_sae(), SaeConfig(32, 96, 8, str(AT), SaeModel("", "", 0)))
    with pytest.raises(InputError, match="do not say which model it reads; give --model"):
        sae_inspect(SaeInspect(str(tmp_path / "nameless")))
    found = sae_inspect(SaeInspect(str(tmp_path / "nameless"), str(place / "model"), max_tokens=600))  # demur's text
    assert 100 < found.metrics["tokens"] + 1 <= 600  # type: ignore[operator]


def test_the_command_says_so_in_its_exit_code(
    place: Path, lm: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(place, lm, codebook(residuals(lm, place)), tmp_path)
    command = ["sae", "inspect", str(tmp_path / "sae"), "--data", str(place / "chat.jsonl"), "--json"]
    assert main(command) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["fits"] is True
    assert found["alternatives"]["layers.0.resid_post"] > found["metrics"]["fvu"]
    assert "fits layers.1.resid_post" in shown.err
    assert main([*command, "--hookpoint", "layers.0"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["sentences"][0].startswith("wrong layer: layers.1.resid_post fits better")


@pytest.mark.real
def test_the_embedded_sae_fits_its_own_block_and_no_other() -> None:
    fits = sae_inspect(SaeInspect("smollm2-135m-instruct", max_tokens=1500))
    assert fits.fits, fits.sentences
    assert fits.metrics["fvu"] < 0.2  # type: ignore[operator]
    other = sae_inspect(SaeInspect("smollm2-135m-instruct", hookpoint="layers.12", max_tokens=1500))
    assert not other.fits
    assert other.sentences[0].startswith("wrong layer: layers.16.resid_post fits better")
