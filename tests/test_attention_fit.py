"""Fitting attention probes, against simulated truth that a mean cannot see, and by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from demur.errors import InputError
from demur.eval import attention_fit
from demur.eval.attention_fit import fit_attention
from demur.eval.probe_fit import Kind, fit_probe
from demur.steering.probe import Probe


def simulated(n: int, seed: int) -> tuple[Tensor, list[int], list[Kind]]:
    """Rows of 2 to 12 tokens, harmful where a single token has two marks at once; others have both, but apart."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 13, (n,), generator=draw).tolist()
    rows, kinds = [], []
    for i, length in enumerate(lengths):
        x = 3 + 5 * torch.randn(length, 8, generator=draw)
        a, b = torch.randperm(length, generator=draw)[:2].tolist()
        x[:, :2] = 0.3 * torch.randn(length, 2, generator=draw)
        x[a, 0] += 3
        x[a if i % 2 else b, 1] += 3
        rows.append(x)
        kinds.append("harmful" if i % 2 else ("lookalike", "benign")[i // 2 % 2])
    return torch.cat(rows), lengths, kinds


def means(x: Tensor, lengths: list[int]) -> np.ndarray:
    return np.stack([row.mean(0).double().numpy() for row in x.split(lengths)])


def test_it_finds_what_one_token_says_and_a_mean_does_not() -> None:
    x, lengths, kinds = simulated(1_200, 0)
    epochs: list[float] = []
    fit = fit_attention(x, lengths, kinds, list(range(1_200)), advance=epochs.append)
    assert sum(epochs) == attention_fit.EPOCHS * 5
    assert fit.attention is not None
    probe = Probe(torch.from_numpy(fit.weight).float(), fit.bias, "layers.1", "attention", attention=fit.attention)
    fresh, long, truth = simulated(600, 1)
    harmful = [kind == "harmful" for kind in truth]
    p = probe.logits(fresh, torch.tensor(long)).sigmoid()
    assert roc_auc_score(harmful, p) > 0.95
    assert fit.auroc > 0.9
    linear = fit_probe(means(x, lengths), kinds, list(range(1_200)))
    assert roc_auc_score(harmful, means(fresh, long) @ linear.weight) < 0.65
    # calibrated: of those it calls likely nearly all are harmful, of the unlikely nearly none
    assert np.mean(np.array(harmful)[p.numpy() > 0.9]) > 0.85
    assert np.mean(np.array(harmful)[p.numpy() < 0.1]) < 0.15


def test_all_networks_are_one_probe() -> None:
    """The probe's logits are the calibrated mean of what the folds' networks say, each by itself."""
    x, lengths, kinds = simulated(300, 2)
    nets: list[torch.nn.Module] = []
    train = attention_fit._train

    def kept(*arguments: object) -> torch.nn.Module:
        nets.append(train(*arguments))  # type: ignore[arg-type]
        return nets[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_fit, "_train", kept)
        fit = fit_attention(x, lengths, kinds, list(range(300)))
    probe = Probe(torch.from_numpy(fit.weight).float(), fit.bias, "layers.1", "attention", attention=fit.attention)
    found = probe.logits(x, torch.tensor(lengths))
    center, scale = x.mean(0), x.std(0)
    with torch.no_grad():
        said = [
            torch.stack(
                [net(((row - center) / scale)[None], torch.ones(1, len(row), dtype=torch.bool))[0] for net in nets]
            )
            for row in x.split(lengths)
        ]
    mean = torch.stack(said).mean(1)
    slope, offset = np.polyfit(mean.numpy(), found.numpy(), 1)
    np.testing.assert_allclose(found.numpy(), slope * mean.numpy() + offset, atol=1e-3)
    assert slope > 0


def test_out_of_fold_predictions_know_nothing_of_a_prompt_or_its_twin() -> None:
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randn(3, 64, generator=draw) for _ in range(60)]
    x = torch.cat([row for row in rows for _ in range(4)])
    kinds: list[Kind] = [kind for kind in ["harmful", "benign"] * 30 for _ in range(4)]
    honest = fit_attention(x, [3] * 240, kinds, [i // 4 for i in range(240)])
    assert 0.25 < honest.auroc < 0.75
    assert fit_attention(x, [3] * 240, kinds, list(range(240))).auroc > 0.95


def test_the_same_seed_gives_the_same_probe_and_leaves_torch_alone() -> None:
    x, lengths, kinds = simulated(120, 4)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one, two, other = (fit_attention(x, lengths, kinds, list(range(120)), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert np.array_equal(one.weight, two.weight)
    assert not np.array_equal(one.weight, other.weight)


def test_rows_without_text_teach_nothing_and_too_few_prompts_are_refused() -> None:
    x, lengths, kinds = simulated(60, 5)
    fit = fit_attention(x, [*lengths, 0, 0], [*kinds, "harmful", "benign"], list(range(62)))
    assert np.isfinite(fit.weight).all()
    assert np.isfinite(fit.out_of_fold).all()
    with pytest.raises(InputError, match="give at least 5"):
        fit_attention(x[:4], [1] * 4, ["harmful", "benign"] * 2, list(range(4)))
