"""Trains one SAE with sparsify on stored activations; `benchmarks/sae_training.py` calls it.

    build/peers/sparsify/bin/python benchmarks/peers/by_sparsify.py JOB.json

The library's own `Trainer` runs the whole training: its `SparseCoder`, its loss (FVU of the batch), its optimiser
(schedule-free signum by default, "optimizer": "adam" for its Adam), decoder norms, counts of tokens since a latent
fired. It wants a language model to hook, so `Stored` stands in for one: its only layer returns the rows of the stored
activations whose numbers the "dataset" lists. Nothing in the step is by hand. A step is timed from when those rows are
handed over until the trainer asks for the next ones, less what `Stored` itself and the evaluation take.

- The command line of sparsify needs CUDA, its `Trainer` does not. Without Triton it decodes with `embedding_bag`.
- Weights are evaluated as its checkpoints store them: averaged, for signum (`optimizer.eval()`).
- It has no option to normalise activations: it trains on them as they are, `b_dec` set to the mean of the first batch.
- Adam there warms up over 1,000 steps, more than a short run has: clipped to a tenth of the run.
- "micro_batches" in the job is its `micro_acc_steps`: the same gradient from smaller intermediates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace

import torch
from job import Job, Log, run
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from torch import Tensor, nn


class Rows(nn.Module):
    """The layer that is hooked: rows of the stored activations, by number."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x
        self.between: Callable[[], None] = lambda: None
        self.handed_over: Callable[[], None] = lambda: None

    def forward(self, rows: Tensor) -> Tensor:
        self.between()
        found = self.x[rows]
        self.handed_over()
        return found


class Stored(nn.Module):
    """What `Trainer` asks of a language model."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.rows = Rows(x)
        self.device = x.device
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.rows(input_ids)


class TimedTrainer(Trainer):
    """`Trainer` that says when it is done instead of writing a checkpoint."""

    done: Callable[[], None]

    def save(self) -> None:
        self.done()


def train(job: Job) -> Job:
    log = Log(job)
    x = log.train
    steps = job["steps"]
    optimizer = job.get("optimizer", "signum")
    config = TrainConfig(
        SparseCoderConfig(num_latents=job["d_sae"], k=job["k"]),
        batch_size=1,  # one item of the dataset is a whole batch of tokens
        micro_acc_steps=job.get("micro_batches", 1),
        optimizer=optimizer,
        lr=job["lr"],
        lr_warmup_steps=min(TrainConfig.lr_warmup_steps, max(1, steps // 10)),
        hookpoints=["rows"],
        init_seeds=[job["seed"]],
        save_every=steps + 2,  # at the end only
        log_to_wandb=False,
    )
    model = Stored(x)
    trainer = TimedTrainer(config, [{"input_ids": row} for row in log.numbers], model)  # type: ignore[arg-type]
    (sae,) = trainer.saes.values()
    (opt,) = trainer.optimizers
    lr = opt.param_groups[0]["lr"] if optimizer == "signum" else trainer.lr_schedulers[0].base_lrs[0]

    seconds = log.seconds
    start: float | None = None

    def handed_over() -> None:
        nonlocal start
        start = time.perf_counter()

    def between() -> None:
        """A step has ended, unless none has begun."""
        nonlocal start
        if start is None:
            return
        seconds.append(time.perf_counter() - start)
        start = None
        if log.due:
            if optimizer == "signum":
                opt.eval()  # the averaged weights, as for a checkpoint
            log.look(lambda part: sae(part).sae_out)
            if optimizer == "signum":
                opt.train()

    model.rows.between, model.rows.handed_over, trainer.done = between, handed_over, between
    trainer.fit()
    assert len(seconds) == steps
    return log.result(
        "sparsify",
        version("eai-sparsify"),
        lr,
        optimizer=optimizer,
        lr_warmup_steps=config.lr_warmup_steps if optimizer == "adam" else None,
        micro_acc_steps=config.micro_acc_steps,
        auxk_alpha=config.auxk_alpha,
        dead_feature_threshold=config.dead_feature_threshold,
        normalize_decoder=config.sae.normalize_decoder,
        normalise_activations=None,
    )


if __name__ == "__main__":
    run(train)
