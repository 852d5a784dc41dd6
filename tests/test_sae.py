"""The SAE room: exact activations, metrics against an oracle, training, files."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from demur.errors import InputError, MismatchError, NotFoundError
from demur.sae.base import Sae
from demur.sae.config import TrainConfig
from demur.sae.metrics import measure
from demur.sae.store import SaeConfig, SaeModel, check_fits, load_sae, save_sae
from demur.sae.topk import TopKSae
from demur.sae.train import State, fit_scale, initialise, train
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


def test_metrics_against_a_plain_computation() -> None:
    sae = tiny_sae()
    x = torch.randn(300, 32) * 3 + 100
    measured = measure(sae, x.split(70))
    dense = sae.encode(x).double()
    error = (x.double() - (dense @ sae.W_dec.double() + sae.b_dec.double())).square().sum()
    assert measured.metrics.fvu == pytest.approx(
        float(error / (x.double() - x.double().mean(0)).square().sum()), rel=1e-5
    )
    assert measured.metrics.l0 == pytest.approx(float((dense > 0).sum(-1).double().mean()))
    assert measured.metrics.dead == pytest.approx(float(((dense > 0).sum(0) == 0).double().mean()))
    assert measured.metrics.tokens == 300
    torch.testing.assert_close(measured.reference.rate, (dense > 0).double().mean(0).float())
    torch.testing.assert_close(measured.reference.max_act, dense.amax(0).float())
    torch.testing.assert_close(measured.reference.sigma, dense.std(0, correction=0).float(), atol=1e-5, rtol=1e-4)
    smallest = [min(float(v) for v in row if v > 0) for row in dense]
    assert float(measured.reference.threshold) == pytest.approx(sum(smallest) / 300, rel=1e-5)


def planted(n: int, seed: int) -> Tensor:
    """Residuals made of 4 of 60 planted directions each, far from the origin."""
    directions = torch.nn.functional.normalize(torch.randn(60, 24, generator=torch.Generator().manual_seed(7)), dim=1)
    generator = torch.Generator().manual_seed(seed)
    which = torch.rand(n, 60, generator=generator).topk(4).indices
    size = 1 + torch.rand(n, 4, generator=generator)
    return torch.zeros(n, 60).scatter(1, which, size) @ directions * 9 + 5


CONFIG = TrainConfig(d_sae=80, k=4, batch_size=256, lr=3e-3, dead_after=5000, seed=1)


def stream(data: Tensor, config: TrainConfig) -> Callable[[int], Iterator[Tensor]]:
    def batches(first: int) -> Iterator[Tensor]:
        while True:
            generator = torch.Generator().manual_seed(first)
            yield data[torch.randint(len(data), (config.batch_size,), generator=generator)]
            first += 1

    return batches


def test_training_explains_planted_data_and_folds_the_scale() -> None:
    data = planted(8000, 0)
    untrained = measure(initialise(data, CONFIG), [(data - data.mean(0)) * fit_scale(data).factor]).metrics.fvu
    sae = train(stream(data, CONFIG), data[:2000], 400, CONFIG)
    metrics = measure(sae, [planted(2000, 1)]).metrics
    assert metrics.fvu < 0.35 < untrained
    assert metrics.l0 <= 4
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 1 / fit_scale(data[:2000]).factor))
    assert sae.unit == pytest.approx(float(norms.mean()))


def test_resuming_gives_the_same_weights() -> None:
    data = planted(3000, 0)
    states: dict[int, State] = {}

    def keep(report: object, state: Callable[[], State]) -> None:
        states[state().step] = state()

    whole = train(stream(data, CONFIG), data[:500], 40, CONFIG, on_step=keep)
    resumed = train(stream(data, CONFIG), data[:500], 40, CONFIG, resume=states[17])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_auxiliary_loss_reaches_the_encoder_of_dead_latents() -> None:
    from demur.sae.train import _loss

    data = planted(500, 0)
    scale = fit_scale(data)
    x = (data - scale.mean) * scale.factor
    sae = initialise(data, CONFIG)
    with torch.no_grad():
        sae.b_enc[:10] = -2.0  # never in the top k, yet sometimes positive
    dead = torch.zeros(80, dtype=torch.bool)
    dead[:10] = True
    p = sae.preactivations(x)
    assert not torch.isin(p.topk(4).indices[p.topk(4).values > 0], torch.arange(10)).any()
    assert bool((p[:, :10] > 0).any())
    for auxk, reached in ((0.0, False), (1 / 32, True)):
        sae.zero_grad()
        loss, _, _ = _loss(sae, x, dead, TrainConfig(d_sae=80, k=4, auxk=auxk))
        loss.backward()
        assert sae.W_enc.grad is not None
        assert bool(sae.W_enc.grad[:, :10].abs().sum() > 0) is reached


def test_nan_activations_are_refused() -> None:
    data = planted(500, 0)
    bad = data.clone()
    bad[3, 2] = torch.nan
    with pytest.raises(InputError, match="step 0: the activations hold NaN"):
        train(lambda first: iter([bad]), data, 1, CONFIG)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"k": 0}, "k is 0, expected at least 1"), ({"k": 99}, "at most d_sae"), ({"warmup": 2.0}, "a share"),
     ({"lr": -1.0}, "negative")],
)  # fmt: skip
def test_bad_training_settings(change: dict[str, float], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        TrainConfig(**{"d_sae": 80, "k": 4, **change})  # type: ignore[arg-type]


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
