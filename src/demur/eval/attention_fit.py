"""Fit a probe with heads that attend to the tokens of a turn, on what was read of them once.

One small network (`demur.steering.probe.Attention`) for each of the folds of `fit_probe`, trained on the rest of the
prompts; what each says of its own fold are the out-of-fold predictions, and the probe is all of them together, their
logits averaged, which tells prompts apart better than one network fitted to everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pad_sequence

from demur.eval.probe_fit import FOLDS, Fit, Kind, Split, calibrated, split, weighted_auroc
from demur.steering.probe import Attention, bounded

UNITS, HEADS = 64, 8
"""Of each fold's network."""
EPOCHS, BATCH, RATE, DECAY = 16, 128, 2e-3, 1.0
"""AdamW with one cycle of the learning rate. The result hardly depends on these: units of 64 to 256, dropout of 0.1 to
0.5 and decays of 0.1 to 5 gave AUROCs within 0.01 on prompts that nothing was fitted to."""
_DROP_INPUT, _DROP_UNITS = 0.1, 0.2
_SORTED = 8
"""Batches that are sorted by length together."""


class _Network(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, UNITS)
        self.query, self.value = nn.Linear(UNITS, HEADS, bias=False), nn.Linear(UNITS, HEADS, bias=False)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[rows] logits of padded `x` [rows, tokens, width]."""
        drop = nn.functional.dropout
        units = drop(self.hidden(drop(x, _DROP_INPUT, self.training)).relu(), _DROP_UNITS, self.training)
        share = bounded(self.query(units)).masked_fill(~mask.unsqueeze(-1), -torch.inf).softmax(1)
        found: Tensor = (share * self.value(units)).sum((1, 2)) + self.bias
        return found


def fit_attention(
    x: Tensor,
    lengths: Sequence[int],
    kinds: Sequence[Kind],
    groups: Sequence[Hashable],
    seed: int = 0,
    advance: Callable[[float], None] = lambda amount: None,
) -> Fit:
    """Fit on tokens `x` [tokens, width], row after row, row r being `lengths[r]` of them; weights, folds and errors as
    of `fit_probe`. Rows without tokens teach nothing. `advance` is told of each of `FOLDS * EPOCHS` epochs."""
    plan = split(kinds, groups, seed)
    center = x.float().mean(0)
    scale = x.float().std(0)
    scale = scale.clamp(min=1e-6 * float(scale.max()) or 1e-6)
    rows = list(x.split(list(lengths)))
    logits = torch.zeros(len(rows))
    nets: list[_Network] = []
    with torch.random.fork_rng(devices=[]):
        for number, (train, test) in enumerate(plan.folds):
            torch.manual_seed(seed * FOLDS + number)
            net = _train(rows, [int(i) for i in train if lengths[i]], plan, center, scale, advance)
            with torch.no_grad():
                for some in _batches([int(i) for i in test if lengths[i]], lengths, shuffled=False):
                    logits[some] = net(*_padded(rows, some, center, scale))
            nets.append(net)
    slope, offset, out_of_fold = calibrated(logits.double().numpy(), plan)
    with torch.no_grad():
        hidden = torch.cat([net.hidden.weight for net in nets]).T / scale.unsqueeze(1)
        before = torch.cat([net.hidden.bias for net in nets]) - center @ hidden
        query = torch.block_diag(*(net.query.weight.T for net in nets))
        value = torch.block_diag(*(net.value.weight.T for net in nets)) * (slope / len(nets))
        bias = slope * float(torch.stack([net.bias for net in nets]).mean()) + offset
    layers = Attention(hidden.contiguous(), before, query)
    auroc = weighted_auroc(logits.double().numpy(), plan)
    return Fit(value.double().numpy(), bias, None, out_of_fold, auroc, layers)


def _train(
    rows: Sequence[Tensor],
    chosen: list[int],
    plan: Split,
    center: Tensor,
    scale: Tensor,
    advance: Callable[[float], None],
) -> _Network:
    net = _Network(len(center))
    labels = torch.from_numpy(plan.harmful).float()
    weights = torch.from_numpy(plan.weights).float()
    lengths = [len(row) for row in rows]
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
    steps = EPOCHS * math.ceil(len(chosen) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for _ in range(EPOCHS):
        for some in _batches(chosen, lengths, shuffled=True):
            found = net(*_padded(rows, some, center, scale))
            loss = binary_cross_entropy_with_logits(found, labels[some], weights[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        advance(1)
    return net.eval()


def _batches(chosen: list[int], lengths: Sequence[int], shuffled: bool) -> list[list[int]]:
    """Batches of rows of like length, in an order of torch's generator if `shuffled`."""
    order = [chosen[i] for i in torch.randperm(len(chosen))] if shuffled else chosen
    found: list[list[int]] = []
    for first in range(0, len(order), BATCH * _SORTED):
        some = sorted(order[first : first + BATCH * _SORTED], key=lambda i: lengths[i])
        found += [some[i : i + BATCH] for i in range(0, len(some), BATCH)]
    return [found[i] for i in torch.randperm(len(found))] if shuffled else found


def _padded(rows: Sequence[Tensor], some: list[int], center: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    x = pad_sequence([(rows[i].float() - center) / scale for i in some], batch_first=True)
    lengths = torch.tensor([len(rows[i]) for i in some])
    return x, torch.arange(x.shape[1]) < lengths.unsqueeze(1)
