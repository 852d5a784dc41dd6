"""SAE training: gradients against autograd, every architecture on planted data, resuming, and several processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from demur.errors import InputError
from demur.parallel import ALONE, Processes
from demur.sae.config import TrainConfig
from demur.sae.metrics import Tokens, measure
from demur.sae.thresholded import BatchTopKSae, JumpReluSae
from demur.sae.topk import TopKSae
from demur.sae.training import gradients, sparse
from demur.sae.training.activations import Batch, Pools, Position, Shards
from demur.sae.training.gradients import Weights
from demur.sae.training.scale import fit_scale
from demur.sae.training.trainer import Trainer, train

ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "jumprelu")


def planted(n: int, seed: int) -> Tensor:
    """Residuals made of 4 of 60 planted directions each, far from the origin."""
    directions = torch.nn.functional.normalize(torch.randn(60, 24, generator=torch.Generator().manual_seed(7)), dim=1)
    generator = torch.Generator().manual_seed(seed)
    which = torch.rand(n, 60, generator=generator).topk(4).indices
    size = 1 + torch.rand(n, 4, generator=generator)
    return torch.zeros(n, 60).scatter(1, which, size) @ directions * 9 + 5


def config(architecture: str = "topk", **more: object) -> TrainConfig:
    given = {"d_sae": 80, "k": 4, "batch_size": 256, "lr": 3e-3, "dead_after": 5000, "seed": 1, **more}
    return TrainConfig(architecture=architecture, **given)  # type: ignore[arg-type]


def some_weights(d_in: int, d_sae: int, seed: int) -> Weights:
    g = torch.Generator().manual_seed(seed)
    decoder = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g, dtype=torch.float64), dim=1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return Weights(
        decoder + 0.1 * noise(d_sae, d_in), 0.1 * noise(d_sae), decoder, 0.3 * noise(d_in), noise(d_sae).abs()
    )


class _Step(torch.autograd.Function):
    """1[p > t], with the slope of a box of width `bandwidth` for t only (arXiv 2407.14435, eq. 12)."""

    @staticmethod
    def forward(ctx, p, t, bandwidth):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(p, t)
        ctx.bandwidth = bandwidth
        return (p > t).to(p.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        p, t = ctx.saved_tensors
        near = ((p - t).abs() < ctx.bandwidth / 2).to(p.dtype)
        return None, (-near / ctx.bandwidth * grad).sum(0), None


class _Gate(torch.autograd.Function):
    """p where p > t, else 0, with a slope for t of -t/bandwidth in the box (eq. 11)."""

    @staticmethod
    def forward(ctx, p, t, bandwidth):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(p, t)
        ctx.bandwidth = bandwidth
        return p * (p > t)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        p, t = ctx.saved_tensors
        near = ((p - t).abs() < ctx.bandwidth / 2).to(p.dtype)
        return grad * (p > t), (-t / ctx.bandwidth * near * grad).sum(0), None


def plain_loss(w: Weights, x: Tensor, dead: Tensor, c: TrainConfig) -> Tensor:
    """The training loss as anyone would write it, dense, for autograd."""
    n, d_in = x.shape
    p = (x - w.b_dec) @ w.encoder.T + w.b_enc
    if c.architecture == "jumprelu":
        f = _Gate.apply(p, w.threshold, c.bandwidth)
    elif c.architecture == "topk":
        keep = torch.zeros_like(p).scatter(1, p.topk(c.k).indices, 1.0)
        f = p.relu() * keep
    else:
        keep = torch.zeros_like(p).flatten().scatter(0, p.flatten().topk(c.k * n).indices, 1.0).view_as(p)
        f = p.relu() * keep
    losses = []
    for end in c.ends:
        error = f[:, :end] @ w.decoder[:end] + w.b_dec - x
        losses.append(error.square().sum() / (n * d_in))
    loss = torch.stack(losses).mean()
    if c.architecture == "jumprelu":
        l0 = _Step.apply(p, w.threshold, c.bandwidth).sum() / n
        loss = loss + c.sparsity * (l0 / c.k - 1).square()
    if c.auxk and bool(dead.any()):
        own = p[:, dead]
        k = min(int(dead.sum()), d_in // 2)
        chosen = torch.zeros_like(own).scatter(1, own.topk(k).indices, 1.0)
        left = -error.detach()
        loss = loss + c.auxk * ((own.relu() * chosen) @ w.decoder[dead] - left).square().sum() / left.square().sum()
    return loss


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(ARCHITECTURES), st.integers(0, 10_000), st.integers(0, 15))
def test_gradients_equal_autograd(architecture: str, seed: int, n_dead: int) -> None:
    c = config(architecture, d_sae=40, k=5, auxk=0.3)
    weights = some_weights(12, 40, seed)
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) * 2
    dead = torch.zeros(40, dtype=torch.bool)
    dead[torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:n_dead]] = True
    found = gradients.step(weights, x, gradients.preactivations(weights, x), dead, 0.0, c, ALONE)
    leaves = Weights(*(w.clone().requires_grad_() for w in weights))
    plain_loss(leaves, x, dead, c).backward()
    for name, mine, leaf in zip(Weights._fields, found.gradients, leaves, strict=True):
        if mine.numel():
            assert leaf.grad is not None
            torch.testing.assert_close(mine, leaf.grad, atol=1e-12, rtol=1e-8, msg=name)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 3))
def test_batch_top_k_takes_the_largest_whatever_the_guess(seed: int, guess: float) -> None:
    p = torch.randn(20, 30, generator=torch.Generator().manual_seed(seed))
    active = sparse.batch_top_k(p, 60, guess)
    dense = torch.zeros_like(p)
    dense[active.rows, active.latents] = active.values
    limit = p.flatten().topk(60).values[-1]
    assert torch.equal(dense, p * (p >= limit) * (p > 0))


def test_top_k_in_two_rounds_is_top_k() -> None:
    p = torch.randn(40, 4096, generator=torch.Generator().manual_seed(3))
    p[3] = 0.0  # ties everywhere
    p[4, 1::2] = -1.0
    active = sparse.top_k(p, 32)
    expected = p.topk(32).values.relu()
    assert torch.equal(active.values.view(40, 32).sort(descending=True).values, expected)
    assert torch.equal(p[active.rows, active.latents].relu(), active.values)
    assert all(len(row.unique()) == 32 for row in active.latents.view(40, 32))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_explains_planted_data_and_folds_the_scale(architecture: str) -> None:
    data = planted(8000, 0)
    c = config(architecture)
    start = measure(Trainer(data[:2000], c, 400).sae(), [Tokens(planted(2000, 1))]).metrics.fvu
    generator = torch.Generator().manual_seed(0)
    batches = (data[torch.randint(len(data), (256,), generator=generator)] for _ in range(400))
    sae = train(batches, data[:2000], 400, c)
    metrics = measure(sae, [Tokens(planted(2000, 1))]).metrics
    assert metrics.fvu < min(0.35, start)
    assert metrics.l0 == pytest.approx(4, rel=0.35)
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 1 / fit_scale(data[:2000]).factor))
    expected = {"topk": TopKSae, "jumprelu": JumpReluSae}.get(architecture, BatchTopKSae)
    assert type(sae) is expected


def test_both_starts_reach_a_like_fvu_and_data_sooner() -> None:
    data = planted(8000, 0)
    found = {}
    for start in ("data", "random"):
        for steps in (40, 400):
            generator = torch.Generator().manual_seed(0)
            batches = (data[torch.randint(len(data), (256,), generator=generator)] for _ in range(steps))
            sae = train(batches, data[:2000], steps, config(start=start))
            found[start, steps] = measure(sae, [Tokens(planted(2000, 1))]).metrics.fvu
    assert found["data", 40] < found["random", 40]
    assert max(found["data", 400], found["random", 400]) < 0.35


def test_matryoshka_prefixes_reconstruct_on_their_own() -> None:
    data = planted(8000, 0)
    found = {}
    for architecture in ("batchtopk", "matryoshka"):
        generator = torch.Generator().manual_seed(0)
        batches = (data[torch.randint(len(data), (256,), generator=generator)] for _ in range(300))
        sae = train(batches, data[:2000], 300, config(architecture, prefixes=(0.25, 1.0)))
        f = sae.encode(data[:1000])
        f[:, 20:] = 0
        error = (sae.decode(f) - data[:1000]).square().sum()
        found[architecture] = float(error / (data[:1000] - data[:1000].mean(0)).square().sum())
    assert found["matryoshka"] < found["batchtopk"] - 0.05


def test_the_auxiliary_loss_revives_dead_latents() -> None:
    data = planted(4000, 0)
    silent = {}
    for auxk in (0.0, 1 / 32):
        c = config(auxk=auxk, dead_after=2000)
        trainer = Trainer(data[:1000], c, 200)
        with torch.no_grad():
            trainer.weights.b_enc[:30] = -1.0  # rarely in the top k, yet often positive
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            trainer.step(data[torch.randint(len(data), (256,), generator=generator)])
        silent[auxk] = float((trainer.sae().encode(data)[:, :30] > 0).any(0).float().mean())
    assert silent[1 / 32] > silent[0.0] + 0.3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resuming_gives_the_same_weights(architecture: str) -> None:
    data = planted(3000, 0)
    c = config(architecture)
    batches = [data[torch.randint(len(data), (256,), generator=torch.Generator().manual_seed(i))] for i in range(30)]
    whole = Trainer(data[:500], c, 30)
    for i, batch in enumerate(batches):
        if i == 17:
            state = whole.state()
        whole.step(batch)
    resumed = Trainer(data[:500], c, 30)
    resumed.restore(state)
    for batch in batches[17:]:
        resumed.step(batch)
    for name, value in whole.state().items():
        assert torch.equal(value, resumed.state()[name]), name
    with pytest.raises(InputError, match="checkpoint is of another SAE"):
        Trainer(data[:500], config(architecture, d_sae=90), 30).restore(state)


def test_the_geometric_median_resists_outliers() -> None:
    data = planted(1000, 0)
    far = data.clone()
    far[:20] = 1e4
    middle = fit_scale(far, "median").mean
    assert float((middle - data.mean(0)).norm()) < 3 < float((fit_scale(far).mean - data.mean(0)).norm())


def test_bad_activations() -> None:
    data = planted(500, 0)
    bad = data.clone()
    bad[3, 2] = torch.nan
    trainer = Trainer(data, config(), 1)
    before = trainer.weights.encoder.clone()
    with pytest.raises(InputError, match="step 0: the activations hold NaN"):
        trainer.step(bad)
    assert torch.equal(trainer.weights.encoder, before)
    with pytest.raises(InputError, match="activations hold NaN"):
        fit_scale(bad)
    with pytest.raises(InputError, match="do not vary"):
        fit_scale(torch.ones(10, 4))
    with pytest.raises(InputError, match="ended after 0 of 5 batches"):
        train([], data, 5, config())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"k": 0}, "k is 0, expected at least 1"), ({"k": 99}, "at most d_sae"), ({"warmup": 2.0}, "a share"),
     ({"lr": -1.0}, "lr is -1.0, expected 0 or more"), ({"bandwidth": 0.0}, "bandwidth is 0.0, expected more"),
     ({"prefixes": (0.5, 0.2, 1.0)}, "expected rising shares"), ({"prefixes": (0.5,)}, "that end with 1")],
)  # fmt: skip
def test_bad_training_settings(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        config(**change)


def shards(folder: Path, sizes: tuple[int, ...] = (100, 64, 130), d: int = 4) -> Tensor:
    """Shards whose rows are all different; returns the rows."""
    rows = torch.arange(sum(sizes) * d, dtype=torch.float32).view(-1, d)
    for i, part in enumerate(rows.split(sizes)):
        tensors = {"layers.1.resid_post": part.contiguous(), "types": torch.zeros(len(part), dtype=torch.uint8)}
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / f"shard-{i:05d}.safetensors", metadata={"seen": str(len(part) + 5)})
    return rows


def first(stream: object, count: int) -> list[Batch]:
    return [next(stream) for _ in range(count)]  # type: ignore[call-overload]


def test_shards_give_every_pass_its_own_order_and_go_on_anywhere(tmp_path: Path) -> None:
    rows = shards(tmp_path)
    stored = Shards(tmp_path)
    assert (stored.tokens, stored.seen, stored.left_out) == (294, 309, pytest.approx(15 / 309))
    assert stored.steps_per_round(48) == 6  # 3 + 2 + 4 stripes of 32
    batches = first(stored.batches(48, 0), 12)
    name = "layers.1.resid_post"
    passed = torch.cat([b.x[name] for b in batches[:6]])
    assert len({int(v) for v in passed[:, 0]}) == 288
    assert {int(v) for v in passed[:, 0]} <= {int(v) for v in rows[:, 0]}
    assert not torch.equal(batches[0].x[name], batches[6].x[name])
    for i in (0, 3, 5, 7):
        again = first(stored.batches(48, 0, batches[i].after), 1)[0]
        assert torch.equal(again.x[name], batches[i + 1].x[name])
    parts = [Shards(tmp_path, Processes(rank, 3)) for rank in range(3)]
    shared = [first(part.batches(48, 0), 5) for part in parts]
    for i in range(5):
        assert torch.equal(torch.cat([s[i].x[name] for s in shared]), batches[i].x[name])
    with pytest.raises(InputError, match="50 tokens cannot be shared equally by 3 processes"):
        next(parts[0].batches(50, 0))


def test_bad_shards(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no shards"):
        Shards(tmp_path)
    shards(tmp_path)
    with pytest.raises(InputError, match="294 tokens are fewer than one batch of 512"):
        Shards(tmp_path).steps_per_round(512)
    whole = torch.zeros(8, dtype=torch.int32)
    save_file({"h": whole, "types": whole.clone()}, tmp_path / "shard-00003.safetensors", metadata={"seen": "8"})
    with pytest.raises(InputError, match=r"h is torch\.int32, expected a floating-point type"):
        Shards(tmp_path)
    (tmp_path / "shard-00003.safetensors").unlink()
    cut = tmp_path / "shard-00001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-7])
    with pytest.raises(InputError, match=r"shard-00001.safetensors is not a whole shard .*; delete it and run"):
        Shards(tmp_path)


def test_pools_mix_two_at_a_time_use_each_token_once_and_go_on_anywhere() -> None:
    def make(number: int) -> dict[str, Tensor]:
        return {"h": torch.arange(100).float().unsqueeze(1) + 1000 * number}

    batches = first(Pools(make).batches(25, 3), 14)  # rounds of 50, 100, 100, 100 tokens
    values = [int(v) for b in batches for v in b.x["h"].flatten()]
    assert len(set(values)) == len(values) == 350
    second = {v // 1000 for b in batches[2:6] for v in b.x["h"].flatten().int().tolist()}
    assert second == {0, 1}
    assert all(len({int(v) // 1000 for v in b.x["h"]}) == 2 for b in batches[2:])
    for i in (0, 1, 3, 5, 9):
        again = first(Pools(make).batches(25, 3, batches[i].after), 1)[0]
        assert torch.equal(again.x["h"], batches[i + 1].x["h"])
    assert batches[1].after == Position(1, 0)
    with pytest.raises(InputError, match="a pool holds 50 tokens, fewer than a batch of 64"):
        next(Pools(make).batches(64, 3))


_WORKER = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[3])
from test_training import ARCHITECTURES, config
from demur.parallel import joined
from demur.sae.training.activations import Shards
from demur.sae.training.trainer import Trainer
torch.set_num_threads(1)
with joined("cpu") as processes:
    for architecture in ARCHITECTURES:
        shards = Shards(Path(sys.argv[1]), processes)
        c = config(architecture, dead_after=1000)
        trainer = Trainer(shards.sample("layers.1.resid_post", 500), c, 25, processes)
        for _, batch in zip(range(25), shards.batches(c.batch_size, 0)):
            trainer.step(batch.x["layers.1.resid_post"])
        if processes.first:
            save_file(trainer.state(), sys.argv[2] + architecture)
"""


def test_two_processes_train_the_same_sae_as_one(tmp_path: Path) -> None:
    data = planted(2000, 0)
    (tmp_path / "a").mkdir()
    for i, part in enumerate(data.split(700)):
        tensors = {"layers.1.resid_post": part.contiguous(), "types": torch.zeros(len(part), dtype=torch.uint8)}
        save_file(tensors, tmp_path / f"a/shard-{i:05d}.safetensors", metadata={"seen": str(len(part))})
    worker = tmp_path / "worker.py"
    worker.write_text(_WORKER)
    for size in (1, 2):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", str(worker),
            str(tmp_path / "a"), str(tmp_path / f"{size}-"), str(Path(__file__).parent),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    for architecture in ARCHITECTURES:
        one, two = (load_file(tmp_path / f"{size}-{architecture}") for size in (1, 2))
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, two[name], atol=2e-4, rtol=1e-3, msg=f"{architecture} {name}")
