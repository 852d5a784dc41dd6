"""Trains one SAE with demur on stored activations; `benchmarks/sae_training.py` calls it.

    python benchmarks/peers/by_demur.py JOB.json

`Trainer.step` is timed, scaling of the batch included. Before each step the floor is: the encoder's matrix product
alone on the same batch, into memory that is there, with the encoder laid out either way.
"""

from __future__ import annotations

import time
from importlib.metadata import version

import torch
from job import Job, Log, run

from demur.sae.config import TrainConfig
from demur.sae.training.trainer import Trainer


def train(job: Job) -> Job:
    log = Log(job)
    config = TrainConfig(d_sae=job["d_sae"], k=job["k"], batch_size=job["batch"], lr=job["lr"] or 0.0, seed=job["seed"])
    trainer = Trainer(log.train[: min(len(log.train), 16_384)], config, job["steps"])
    by_latent = torch.randn(job["d_sae"], log.train.shape[1])
    layouts = (by_latent.T, by_latent.T.contiguous())
    out = torch.empty(job["batch"], job["d_sae"])
    floors: tuple[list[float], ...] = ([], [])
    for rows in log.numbers:
        batch = log.train[rows]
        if job.get("floor"):
            for encoder, floor in zip(layouts, floors, strict=True):
                start = time.perf_counter()
                torch.mm(batch, encoder, out=out)
                floor.append(time.perf_counter() - start)
        start = time.perf_counter()
        trainer.step(batch)
        log.seconds.append(time.perf_counter() - start)
        if log.due:
            log.look(trainer.sae().reconstruct)
    return {
        **log.result("demur", version("demur"), config.peak_lr(job["steps"]), auxk=config.auxk),
        "floor_seconds": floors,
    }


if __name__ == "__main__":
    run(train)
