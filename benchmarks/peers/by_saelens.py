"""Trains one SAE with SAELens on stored activations; `benchmarks/sae_training.py` calls it.

    build/peers/saelens/bin/python benchmarks/peers/by_saelens.py JOB.json

The library's own `SAETrainer` runs the whole training of a `TopKTrainingSAE`: `fit()` asks a data provider for batches
(an iterator is enough, no language model is needed) and calls `step()` for each, which scales the batch, runs
`training_forward_pass` and the backward pass, clips the gradient, steps Adam and the schedule, and counts what fired.
That call is what is timed. Nothing in it is by hand, except:

- Activations are normalised with its "expected_average_only_in" (by default it does not normalise, and at 3e-4 Adam
  is slow to move biases that begin at zero to residuals of this size); "normalize_activations" in the job names
  another of its ways. Its `ActivationScaler` estimates the factor before training, from the batches of the first tenth
  of the run, so that the steps still begin at the first row. Held-out activations are scaled and unscaled with it.
- "sparse" in the job is its `use_sparse_activations`, "compile" is what its runner does for `compile_sae`,
  "lr_decay_steps" is the option of that name. All are off by default, as in the library. On a CPU the backward pass of
  sparse activations fails (torch 2.13: no `view` for SparseCPU) while `rescale_acts_by_decoder_norm` is on, as it is by
  default: "sparse" turns that off, which is another recipe and not only another speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from job import Job, Log, run
from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor


class TimedTrainer(SAETrainer[TopKTrainingSAE, TopKTrainingSAEConfig]):
    """`SAETrainer` whose steps are timed, and looked at afterwards."""

    seconds: list[float]
    after: Callable[[], None]

    def step(self, batch: Tensor) -> Any:
        start = time.perf_counter()
        output = super().step(batch)
        self.seconds.append(time.perf_counter() - start)
        self.after()
        return output


def train(job: Job) -> Job:
    log = Log(job)
    x = log.train
    steps, batch = job["steps"], job["batch"]
    sparse = job.get("sparse", False)
    normalise = job.get("normalize_activations", "expected_average_only_in")
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=x.shape[1],
            d_sae=job["d_sae"],
            k=job["k"],
            normalize_activations=normalise,
            use_sparse_activations=sparse,
            rescale_acts_by_decoder_norm=not sparse,
        )
    )
    if job.get("compile"):
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)  # type: ignore[method-assign]
    lr = job["lr"] or SAETrainerConfig.lr
    config = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=lr,
        lr_end=lr / 10,  # what its runner sets; a constant schedule does not use it
        lr_decay_steps=job.get("lr_decay_steps", 0),
        n_batches_for_norm_estimate=max(1, steps // 10),
    )
    trainer = TimedTrainer(config, sae, (x[rows] for rows in log.numbers))
    scaler = trainer.activation_scaler
    estimates = {
        "expected_average_only_in": scaler.estimate_scaling_factor,
        "covariance_whitening": scaler.estimate_whitening,
    }
    if normalise in estimates:  # else the SAE does it itself
        estimates[normalise](x.shape[1], (x[rows] for rows in log.numbers), config.n_batches_for_norm_estimate)
    factor = scaler.scaling_factor  # folded into the weights at the end

    trainer.seconds = log.seconds

    def after() -> None:
        if log.due:
            sae.eval()
            log.look(lambda part: scaler.unscale(sae(scaler.scale(part))))
            sae.train()

    trainer.after = after
    trainer.fit()
    assert len(trainer.seconds) == steps
    return log.result(
        "saelens",
        version("sae-lens"),
        lr,
        optimizer="adam",
        lr_scheduler_name=config.lr_scheduler_name,
        lr_warm_up_steps=config.lr_warm_up_steps,
        lr_decay_steps=config.lr_decay_steps,
        normalize_activations=normalise,
        scaling_factor=factor,
        use_sparse_activations=sae.cfg.use_sparse_activations,
        compile_sae=bool(job.get("compile")),
        aux_loss_coefficient=sae.cfg.aux_loss_coefficient,
        dead_feature_window=config.dead_feature_window,
        decoder_init_norm=sae.cfg.decoder_init_norm,
        rescale_acts_by_decoder_norm=sae.cfg.rescale_acts_by_decoder_norm,
    )


if __name__ == "__main__":
    run(train)
