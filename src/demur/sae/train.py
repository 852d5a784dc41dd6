"""Train a top-k SAE on an iterator of residuals. Needs no language model.

Recipe: decoder rows of unit norm, encoder tied at the start, b_dec at the mean; MSE in units of the data's
variance plus AuxK on dead latents with its real gradient to the encoder; Adam, warmup, constant, linear decay;
the gradient along decoder rows is removed and rows are renormalised after every step; decoding gathers k rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from demur.errors import InputError
from demur.sae.config import TrainConfig
from demur.sae.topk import TopKSae


class Scale(NamedTuple):
    """How raw residuals are brought to the units that an SAE is trained in: (x - mean) * factor."""

    mean: Tensor
    """[d_in]"""
    factor: float
    """sqrt(d_in) over the root mean squared norm of centred residuals."""


def fit_scale(sample: Tensor) -> Scale:
    """Scale from a sample of residuals [n, d_in]."""
    mean = sample.mean(0)
    norm = float((sample - mean).square().sum(-1).mean().sqrt())
    if not norm > 0:
        raise InputError("the activations do not vary, so no SAE can be trained on them")
    return Scale(mean, sample.shape[1] ** 0.5 / norm)


class State(NamedTuple):
    """Everything a run of training needs to go on."""

    step: int
    tensors: dict[str, Tensor]
    """Parameters, Adam's moments and `silent`: tokens since each latent last fired."""


class StepReport(NamedTuple):
    """What happened in one step."""

    step: int
    tokens: int
    fvu: float
    """Of this batch, while training."""
    dead: float
    """Share of latents that have not fired for `dead_after` tokens."""


def initialise(sample: Tensor, config: TrainConfig) -> TopKSae:
    """An untrained SAE for residuals like `sample` [n, d_in], in the units of `fit_scale`."""
    sae = TopKSae(sample.shape[1], config.d_sae, config.k)
    generator = torch.Generator().manual_seed(config.seed)
    directions = torch.randn(config.d_sae, sae.d_in, generator=generator)
    with torch.no_grad():
        sae.W_dec.copy_(F.normalize(directions, dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


def train(
    batches: Callable[[int], Iterable[Tensor]],
    sample: Tensor,
    total_steps: int,
    config: TrainConfig,
    resume: State | None = None,
    on_step: Callable[[StepReport, Callable[[], State]], None] = lambda report, state: None,
) -> TopKSae:
    """Train on `batches(first_step)`: raw residuals [batch, d_in] from that step on, until `total_steps`.

    `sample` [n, d_in] sets scale and initialisation; give the same one to resume. `on_step` gets a report and a
    function that copies the state, for checkpoints. Returns an SAE that reads raw residuals (the scale is folded
    in). Raises `InputError` on NaN or infinite activations.
    """
    scale = fit_scale(sample)
    sae = initialise(sample, config).to(sample.device)
    optimiser = torch.optim.Adam(sae.parameters(), lr=config.peak_lr, betas=(0.9, 0.999), eps=6.25e-10)
    silent = torch.zeros(config.d_sae, dtype=torch.long, device=sample.device)
    start = 0
    if resume is not None:
        start = resume.step
        _restore(sae, optimiser, silent, resume)
    stream: Iterator[Tensor] = iter(batches(start))
    for step in range(start, total_steps):
        raw = next(stream).to(sample.device, torch.float32)
        if not bool(torch.isfinite(raw).all()):
            raise InputError(f"step {step}: the activations hold NaN or infinity; harvest in another dtype")
        x = (raw - scale.mean) * scale.factor
        for group in optimiser.param_groups:
            group["lr"] = config.peak_lr * _schedule(step, total_steps, config)
        dead = silent >= config.dead_after
        loss, fvu, fired = _loss(sae, x, dead, config)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        _keep_decoder_unit(sae, before_step=True)
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        _keep_decoder_unit(sae, before_step=False)
        silent += len(x)
        silent[fired] = 0
        report = StepReport(step + 1, (step + 1) * len(x), fvu, float(dead.float().mean()))
        on_step(report, partial(_state, step + 1, sae, optimiser, silent))
    return fold(sae, scale)


def fold(sae: TopKSae, scale: Scale) -> TopKSae:
    """The same SAE for raw residuals. Latent values do not change; decoder rows get the norm 1 / factor."""
    folded = TopKSae(sae.d_in, sae.d_sae, sae.k)
    with torch.no_grad():
        folded.W_enc.copy_(sae.W_enc * scale.factor)
        folded.b_enc.copy_(sae.b_enc)
        folded.W_dec.copy_(sae.W_dec / scale.factor)
        folded.b_dec.copy_(sae.b_dec / scale.factor + scale.mean)
    return folded.requires_grad_(False)


def _loss(sae: TopKSae, x: Tensor, dead: Tensor, config: TrainConfig) -> tuple[Tensor, float, Tensor]:
    """Training loss, FVU of the batch, and which latents fired."""
    # b_dec as a bias: subtracting it from x would cost a whole matrix product in the backward pass, for its gradient
    p = x @ sae.W_enc + (sae.b_enc - sae.b_dec @ sae.W_enc)
    top = p.topk(sae.k, dim=-1, sorted=False)
    values = top.values.relu()
    flat = F.embedding_bag(top.indices, sae.W_dec, per_sample_weights=values, mode="sum") + sae.b_dec
    error = x - flat
    variance = (x - x.mean(0)).square().sum()
    fvu = error.square().sum() / variance
    loss = fvu
    n_dead = int(dead.sum())
    if config.auxk and n_dead:
        # dead latents are asked to explain what is left, so that they have a gradient at all
        k_aux = min(n_dead, max(sae.d_in // 2, 1))
        aux = p[:, dead].topk(k_aux, dim=-1, sorted=False)
        guess = F.embedding_bag(aux.indices, sae.W_dec[dead], per_sample_weights=aux.values.relu(), mode="sum")
        target = error.detach()
        left = (target - target.mean(0)).square().sum()
        loss = loss + config.auxk * torch.nan_to_num((target - guess).square().sum() / left)
    fired = torch.zeros_like(dead)
    fired[top.indices[values > 0]] = True
    return loss, float(fvu.detach()), fired


def _keep_decoder_unit(sae: TopKSae, before_step: bool) -> None:
    """Before a step: remove the gradient along the rows. After it: put their norm back to one."""
    with torch.no_grad():
        if before_step:
            assert sae.W_dec.grad is not None
            along = (sae.W_dec.grad * sae.W_dec).sum(-1, keepdim=True)
            sae.W_dec.grad.sub_(along * sae.W_dec)
        else:
            sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))


def _schedule(step: int, total: int, config: TrainConfig) -> float:
    """Learning-rate factor: linear warmup, constant, linear decay to zero."""
    rising = (step + 1) / max(config.warmup * total, 1)
    falling = (total - step) / max(config.decay * total, 1)
    return min(1.0, rising, falling)


def _state(step: int, sae: TopKSae, optimiser: torch.optim.Adam, silent: Tensor) -> State:
    tensors = {name: value.detach().clone() for name, value in sae.named_parameters()}
    for name, parameter in sae.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{name}.{moment}"] = optimiser.state[parameter][moment].clone()
    return State(step, {**tensors, "silent": silent.clone()})


def _restore(sae: TopKSae, optimiser: torch.optim.Adam, silent: Tensor, state: State) -> None:
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(state.tensors[name])
            saved: dict[str, Any] = {
                m: state.tensors[f"{name}.{m}"].to(parameter.device, copy=True) for m in ("exp_avg", "exp_avg_sq")
            }
            optimiser.state[parameter] = {"step": torch.tensor(float(state.step)), **saved}
        silent.copy_(state.tensors["silent"])
