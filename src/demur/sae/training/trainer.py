"""One SAE in training: initialisation, steps, state, and what comes out.

Recipe: residuals centred and scaled; decoder rows of unit norm, encoder tied at the start; FVU plus AuxK; Adam with
warmup, plateau and linear decay; the gradient along decoder rows is removed and rows are renormalised after each step.
Weights, moments and gradients are float32, whatever the residuals are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from demur.errors import InputError
from demur.parallel import ALONE, Processes
from demur.sae.base import Sae
from demur.sae.config import TrainConfig
from demur.sae.thresholded import BatchTopKSae, JumpReluSae
from demur.sae.topk import TopKSae
from demur.sae.training import gradients, sparse
from demur.sae.training.gradients import Weights
from demur.sae.training.scale import fit_scale

_MOMENTS = ("exp_avg", "exp_avg_sq")
_CLIP = 1.0
_FITTED = 1024
"""Tokens of the sample that the encoder's first length, and jumprelu's first threshold, are fitted on."""


class StepReport(NamedTuple):
    """What happened in one step."""

    step: int
    tokens: int
    """Seen so far, over all processes."""
    fvu: float
    """Of this batch, while training."""
    l0: float
    """Mean number of active latents per token in this batch."""
    dead: float
    """Share of latents that have not fired for `dead_after` tokens."""
    lr: float


class Trainer:
    """Trains one SAE for residuals like `sample` [n, d_in] (raw; the same one on every process and on resuming)."""

    def __init__(self, sample: Tensor, config: TrainConfig, total_steps: int, processes: Processes = ALONE) -> None:
        """Raises `InputError` for a sample that is not finite or does not vary."""
        sample = sample.float()
        self.config, self.total_steps, self._processes = config, total_steps, processes
        self.scale = fit_scale(sample, config.center)
        self.steps = 0
        self._peak = config.peak_lr(total_steps)
        self.weights = _initial((sample - self.scale.mean) * self.scale.factor, config)
        self._silent = torch.zeros(config.d_sae, dtype=torch.long, device=sample.device)
        self._smallest = torch.zeros((), device=sample.device)
        self._buffer: Tensor | None = None
        self._adam = torch.optim.Adam(
            [w.requires_grad_() for w in self.weights if w.numel()], betas=(0.9, 0.999), eps=1e-8, fused=True
        )

    @torch.no_grad()
    def step(self, raw: Tensor) -> StepReport:
        """Learn from residuals `raw` [n, d_in], this process's share of the batch, of equal size on every process.

        Raises `InputError` on NaN or infinity, before anything is changed.
        """
        x = (raw.to(self.weights.b_dec.device, torch.float32) - self.scale.mean).mul_(self.scale.factor)
        size = (len(x), self.config.d_sae)
        if self._buffer is None or self._buffer.shape != size:
            self._buffer = x.new_empty(size)
        weights = Weights(*(w.detach() for w in self.weights))
        p = gradients.preactivations(weights, x, self._buffer)
        dead = self._silent >= self.config.dead_after
        found = gradients.step(weights, x, p, dead, float(self._smallest) * 0.9, self.config, self._processes)
        fvu = float(found.fvu)
        if not fvu < float("inf"):
            raise InputError(f"step {self.steps}: the activations hold NaN or infinity; harvest in another dtype")
        self._update(found.gradients, weights)
        self._processes.any_(found.fired)
        tokens = len(x) * self._processes.size
        self._silent += tokens
        self._silent[found.fired] = 0
        numbers = torch.stack([found.fvu, found.active, found.smallest])
        self._processes.mean_(numbers)
        # an average that forgets over a thousand steps, and sooner at the start
        keep = min(0.999, (1 + self.steps) / (10 + self.steps)) if self.steps else 0.0
        self._smallest = self._smallest * keep + numbers[2] * (1 - keep)
        self.steps += 1
        return StepReport(
            self.steps,
            self.steps * tokens,
            float(numbers[0]),
            float(numbers[1]),
            float(dead.float().mean()),
            self._adam.param_groups[0]["lr"],
        )

    def _update(self, found: Weights, weights: Weights) -> None:
        present = [g for g in found if g.numel()]
        self._processes.mean_(*present)
        # rows keep their length, so what would change it is no gradient
        along = (found.decoder * weights.decoder).sum(-1, keepdim=True)
        found.decoder.addcmul_(along, weights.decoder, value=-1)
        for weight, gradient in zip((w for w in self.weights if w.numel()), present, strict=True):
            weight.grad = gradient
        torch.nn.utils.clip_grad_norm_(self._adam.param_groups[0]["params"], _CLIP)
        self._adam.param_groups[0]["lr"] = self._peak * _schedule(self.steps, self.total_steps, self.config)
        self._adam.step()
        weights.decoder.div_(weights.decoder.norm(dim=-1, keepdim=True))

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on: weights, Adam's moments, silence and threshold. On the CPU, copied."""
        tensors: dict[str, Tensor] = {"silent": self._silent, "smallest": self._smallest}
        for name, weight in self._named():
            tensors[name] = weight.detach()
            for moment in _MOMENTS:
                tensors[f"{name}.{moment}"] = self._adam.state[weight][moment]
        return {
            **{name: value.to("cpu", copy=True) for name, value in tensors.items()},
            "steps": torch.tensor(self.steps),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`. Raises `InputError` where it is of another SAE."""
        expected = {"silent", "smallest", "steps"} | {
            key for name, _ in self._named() for key in (name, *(f"{name}.{m}" for m in _MOMENTS))
        }
        if set(state) != expected or state["encoder"].shape != self.weights.encoder.shape:
            raise InputError("the checkpoint is of another SAE; give another work folder")
        self.steps = int(state["steps"])
        for name, weight in self._named():
            weight.copy_(state[name])
            moments: dict[str, Any] = {m: state[f"{name}.{m}"].to(weight.device, copy=True) for m in _MOMENTS}
            self._adam.state[weight] = {"step": torch.tensor(float(self.steps), device=weight.device), **moments}
        self._silent.copy_(state["silent"])
        self._smallest.copy_(state["smallest"])

    def _named(self) -> Iterable[tuple[str, Tensor]]:
        return ((name, weight) for name, weight in self.weights._asdict().items() if weight.numel())

    @torch.no_grad()
    def sae(self) -> Sae:
        """The SAE as it stands, for raw residuals: latent values stay, decoder rows get the norm 1 / factor.

        A batch-top-k (or matryoshka) SAE is a JumpReLU with one threshold: the running mean of the smallest
        activation that counted.
        """
        weights, config = self.weights, self.config
        d_in = len(weights.b_dec)
        made: Sae
        if config.architecture == "topk":
            made = TopKSae(d_in, config.d_sae, config.k)
        elif config.architecture == "jumprelu":
            made = JumpReluSae(d_in, config.d_sae)
            made.threshold.copy_(weights.threshold.relu())
        else:
            made = BatchTopKSae(d_in, config.d_sae)
            made.threshold.fill_(float(self._smallest))
        made.to(weights.b_dec.device)
        made.W_enc.copy_(weights.encoder.T * self.scale.factor)
        made.b_enc.copy_(weights.b_enc)
        made.W_dec.copy_(weights.decoder / self.scale.factor)
        made.b_dec.copy_(weights.b_dec / self.scale.factor + self.scale.mean)
        return made.requires_grad_(False)


def train(
    batches: Iterable[Tensor],
    sample: Tensor,
    total_steps: int,
    config: TrainConfig,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> Sae:
    """Train one SAE on `batches` of raw residuals [batch_size, d_in] and return it. Needs no language model.

    For checkpoints, several SAEs or several processes use `Trainer`. Raises `InputError` on NaN or infinity, or when
    `batches` ends early.
    """
    trainer = Trainer(sample, config, total_steps)
    stream = iter(batches)
    for step in range(total_steps):
        batch = next(stream, None)
        if batch is None:
            raise InputError(f"the activations ended after {step} of {total_steps} batches; give more, or fewer steps")
        on_step(trainer.step(batch))
    return trainer.sae()


def _initial(x: Tensor, config: TrainConfig) -> Weights:
    """Weights to start from, in the units of `x` [n, d_in]."""
    generator = torch.Generator().manual_seed(config.seed)
    decoder = F.normalize(torch.randn(config.d_sae, x.shape[1], generator=generator).to(x.device), dim=1)
    if config.start == "data":
        # differences find the structure of the data much sooner, noise keeps rows apart
        one, other = torch.randint(len(x), (2, config.d_sae), generator=generator).to(x.device)
        decoder = F.normalize(decoder + F.normalize(x[one] - x[other], dim=1), dim=1)
    # the k best of many directions overshoot: begin with the encoder's length that reconstructs best
    some = x[:_FITTED]
    active = sparse.top_k(some @ decoder.T, config.k)
    guess = sparse.decode(active, decoder, len(some)).rows
    length = float((guess * some).sum() / guess.square().sum())
    encoder = decoder * length
    threshold = x.new_zeros(0)
    if config.architecture == "jumprelu":
        # L0 starts where it is to end, so that short runs need no annealing
        limit = sparse.batch_top_k(some @ encoder.T, config.k * len(some), 0.0).values.amin()
        threshold = limit.expand(config.d_sae).clone()
    return Weights(encoder, x.new_zeros(config.d_sae), decoder, x.new_zeros(x.shape[1]), threshold)


def _schedule(step: int, total: int, config: TrainConfig) -> float:
    """Learning-rate factor: linear warmup, constant, linear decay to zero."""
    rising = (step + 1) / max(config.warmup * total, 1)
    falling = (total - step) / max(config.decay * total, 1)
    return min(1.0, rising, falling)
