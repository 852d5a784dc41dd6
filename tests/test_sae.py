"""The SAE room: exact activations, metrics against an oracle, training, files."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from demur.errors import InputError, MismatchError, NotFoundError
from demur.sae.base import Sae
from demur.sae.metrics import Tokens, measure
from demur.sae.store import SaeConfig, SaeModel, check_fits, load_sae, save_sae
from demur.sae.thresholded import JumpReluSae
from demur.sae.topk import TopKSae
from demur.testing import tiny_sae


def read(sae: Sae, x: Tensor, latent: int) -> Tensor:
    flat = sae.prepare(x.flatten(0, -2)).x
    return sae.reader([latent])(flat, torch.ones(len(flat), 1, dtype=torch.bool)).view(x.shape[:-1])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_one_latents_activation_equals_encode(seed: int, k: int) -> None:
    sae = tiny_sae(d_in=16, d_sae=40, k=k, seed=seed % 1000)
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(seed)) * 2
    dense = sae.encode(x)
    for latent in range(0, 40, 3):
        torch.testing.assert_close(read(sae, x, latent), dense[..., latent], atol=1e-6, rtol=1e-5)


def test_encode_keeps_the_k_largest_and_decode_agrees() -> None:
    sae = tiny_sae()
    x = torch.randn(50, 32)
    p = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).double()
    expected = torch.zeros_like(p)
    for row in range(50):
        for place in sorted(range(96), key=lambda i: -float(p[row, i]))[:8]:
            expected[row, place] = max(0.0, float(p[row, place]))
    dense = sae.encode(x)
    torch.testing.assert_close(dense.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x), sae.decode(dense), atol=1e-5, rtol=1e-5)


def relu_like(sae: TopKSae) -> JumpReluSae:
    other = JumpReluSae(sae.d_in, sae.d_sae, "constant_norm")
    other.load_state_dict({**sae.state_dict(), "threshold": torch.full((sae.d_sae,), 2.5)})
    return other.requires_grad_(False)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_metrics_against_a_plain_computation(kind: str) -> None:
    topk = tiny_sae()
    sae: Sae = topk if kind == "topk" else relu_like(topk)
    n = 301  # 7 x 43: no rate but 1 is an edge of the histogram
    x = torch.randn(n, 32, generator=torch.Generator().manual_seed(3)) * 3 + (100 if kind == "topk" else 0)
    types = torch.arange(n).remainder(7).clamp(max=3).to(torch.uint8)
    x[types == 2] *= 1.3
    measured = measure(sae, map(Tokens, x.split(70), types.split(70)))
    metrics = measured.metrics
    dense = sae.encode(x).double()
    size = x.double().norm(dim=-1, keepdim=True) / 32**0.5 if kind == "jumprelu" else 1
    rebuilt = (dense @ sae.W_dec.double() + sae.b_dec.double()) * size

    def fvu(which: Tensor) -> float:
        own, made = x[which].double(), rebuilt[which]
        return float((own - made).square().sum() / (own - own.mean(0)).square().sum())

    assert metrics.fvu == pytest.approx(fvu(torch.ones(n, dtype=torch.bool)), rel=1e-5)
    assert measured.fvu_by_type == pytest.approx({kind: fvu(types == kind) for kind in range(4)}, rel=1e-5)
    assert measured.tokens_by_type == {kind: int((types == kind).sum()) for kind in range(4)}
    active = dense > 0
    assert metrics.l0 == pytest.approx(float(active.sum(-1).double().mean()))
    assert metrics.dead == pytest.approx(float((active.sum(0) == 0).double().mean()))
    assert metrics.tokens == n
    assert metrics.l2_ratio == pytest.approx(float((rebuilt.norm(dim=-1) / x.double().norm(dim=-1)).mean()), rel=1e-5)
    assert metrics.zero_share == pytest.approx(float((~active.any(-1)).double().mean()))
    torch.testing.assert_close(measured.reference.rate, active.double().mean(0).float())
    torch.testing.assert_close(measured.reference.max_act, dense.amax(0).float())
    torch.testing.assert_close(measured.reference.sigma, dense.std(0, correction=0).float(), atol=1e-5, rtol=1e-4)
    logs = [math.log10(rate) for rate in active.double().mean(0).tolist() if rate > 0]
    low = measured.rates.edges[:-1]
    assert [sum(a <= log < a + 0.5 or log == a + 0.5 == 0 for log in logs) for a in low] == [*measured.rates.counts]
    assert measured.rates.never == 96 - len(logs) == int((active.sum(0) == 0).sum())
    smallest = [min(float(v) for v in row if v > 0) for row in dense if bool((row > 0).any())]
    expected = sum(smallest) / len(smallest) if kind == "topk" else 0
    assert float(measured.reference.threshold) == pytest.approx(expected, rel=1e-5)


def test_metrics_do_not_depend_on_how_tokens_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = tiny_sae(), torch.randn(300, 32)
    whole = measure(sae, [Tokens(x), Tokens(x[:0])])
    monkeypatch.setattr("demur.sae.metrics._LATENTS", 96 * 7)
    parts = measure(sae, map(Tokens, x.split(11)))
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-5)
    assert parts.rates == whole.rates
    assert whole.fvu_by_type == parts.fvu_by_type == {}


def test_tokens_without_an_active_latent_are_counted_and_spoil_nothing() -> None:
    sae = tiny_sae()
    sae.b_enc.fill_(-1e3)
    measured = measure(sae, [Tokens(torch.randn(50, 32))])
    assert measured.metrics.zero_share == 1
    assert measured.metrics.dead == 1
    assert measured.rates.never == 96
    assert float(measured.reference.threshold) == 0


def test_a_topk_sae_is_measured_without_a_dense_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TopKSae, "decode", lambda *a: pytest.fail("decoded densely"))
    monkeypatch.setattr(TopKSae, "encode_prepared", lambda *a: pytest.fail("encoded densely"))
    assert measure(tiny_sae(), [Tokens(torch.randn(20, 32))]).metrics.l0 > 0


MADE_FOR = SaeModel("some/model", "f" * 16, 3)


def saved(folder: Path, dtype: torch.dtype = torch.float32) -> TopKSae:
    sae = tiny_sae()
    save_sae(folder, sae, SaeConfig(32, 96, 8, "layers.1.resid_post", MADE_FOR), dtype)
    return sae


def test_files_round_trip_and_hash_their_meaning(tmp_path: Path) -> None:
    sae = saved(tmp_path / "a")
    loaded = load_sae(tmp_path / "a")
    for name, value in sae.state_dict().items():
        assert torch.equal(value, loaded.sae.state_dict()[name])
    saved(tmp_path / "b")
    assert load_sae(tmp_path / "b").hash == loaded.hash
    config = json.loads((tmp_path / "b/cfg.json").read_text())
    (tmp_path / "b/cfg.json").write_text(json.dumps({**config, "metrics": {"fvu": 0.5}}))
    assert load_sae(tmp_path / "b").hash == loaded.hash
    (tmp_path / "b/cfg.json").write_text(json.dumps({**config, "k": 7}))
    assert load_sae(tmp_path / "b").hash != loaded.hash


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path: Path) -> None:
    sae = saved(tmp_path, torch.float16)
    loaded = load_sae(tmp_path).sae
    assert loaded.W_enc.dtype == torch.float32
    torch.testing.assert_close(loaded.W_dec, sae.W_dec, atol=1e-3, rtol=1e-3)


def test_bad_sae_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no SAE is at"):
        load_sae(tmp_path / "none")
    saved(tmp_path / "other")
    (tmp_path / "other/cfg.json").write_text('{"architecture": "topk"}')
    with pytest.raises(InputError, match="is not a demur SAE"):
        load_sae(tmp_path / "other")
    saved(tmp_path / "cut")
    weights = tmp_path / "cut/sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_sae(tmp_path / "cut")
    saved(tmp_path / "wrong")
    weights = tmp_path / "wrong/sae.safetensors"
    save_file({**load_file(weights), "W_dec": torch.zeros(4, 4)}, weights)
    with pytest.raises(MismatchError, match=r"W_dec is \(4, 4\), but cfg.json asks for \(96, 32\)"):
        load_sae(tmp_path / "wrong")
    (tmp_path / "wrong/sae.safetensors").unlink()
    with pytest.raises(NotFoundError, match="is missing"):
        load_sae(tmp_path / "wrong")


def test_an_sae_of_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    loaded = load_sae(tmp_path)
    check_fits(loaded, "some/model", "other", 32, 3)
    check_fits(loaded, "/a/local/copy", "f" * 16, 32, 3)
    with pytest.raises(MismatchError, match=r"width 32 with 3 blocks \(some/model\), but m has width 64"):
        check_fits(loaded, "m", "f" * 16, 64, 3)
    with pytest.raises(MismatchError, match="was trained on some/model, but the model is m"):
        check_fits(loaded, "m", "0" * 16, 32, 3)
