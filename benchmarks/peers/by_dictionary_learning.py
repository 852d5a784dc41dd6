"""Trains one SAE with dictionary_learning on stored activations; `benchmarks/sae_training.py` calls it.

    build/peers/dictionary_learning/bin/python benchmarks/peers/by_dictionary_learning.py JOB.json

The library's own `TopKTrainer` does each step of an `AutoEncoderTopK`: `update(step, x)` sets `b_dec` to the geometric
median of the first batch, runs forward and backward passes with AuxK, removes the gradient along the decoder, clips,
steps Adam and the schedule, normalises the decoder and counts tokens since a latent fired. By hand is only the loop
around it, which is what the library's `trainSAE` does on a CPU (no autocast) when nothing is logged or saved: that
function hands back neither the trainer nor the norm it divides by. A step is timed with that division.

- Activations are divided by the library's `get_norm_factor` (`trainSAE(normalize_activations=True)`, as its authors'
  own runs do; "normalize_activations": false in the job turns it off). Held-out ones are divided and multiplied back.
- The schedule is the authors' own: warmup, then constant, then linear to zero over the last fifth. The 1,000 steps of
  warmup are more than a short run has (the library refuses them): clipped to a tenth of the run.
- Importing the library imports nnsight and transformers, which imports torchvision where there is one; the one that
  nnsight brings is not built for a CPU-only torch and breaks the import. Nothing here needs it, so it is hidden.
- The threshold average begins after 1,000 steps, so a shorter run has none. It is not used for top-k.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import version

from job import Job, Log, run

sys.modules["torchvision"] = None  # type: ignore[assignment]

from dictionary_learning.trainers.top_k import TopKTrainer  # noqa: E402
from dictionary_learning.training import get_norm_factor  # noqa: E402

WARMUP_STEPS = 1000
"""Default of `TopKTrainer`."""
DECAY_START = 0.8
"""Where the authors' runs begin to decay; the library's own default is never."""
NORM_BATCHES = 100
"""As `trainSAE` asks of `get_norm_factor`."""


def train(job: Job) -> Job:
    log = Log(job)
    x = log.train
    steps = job["steps"]
    factor = 1.0
    if job.get("normalize_activations", True):
        factor = get_norm_factor((x[rows] for rows in log.numbers[:NORM_BATCHES]), steps=NORM_BATCHES)
    trainer = TopKTrainer(
        steps=steps,
        activation_dim=x.shape[1],
        dict_size=job["d_sae"],
        k=job["k"],
        layer=0,  # only recorded
        lm_name="stored activations",
        lr=job["lr"],
        warmup_steps=min(WARMUP_STEPS, steps // 10),
        decay_start=int(steps * DECAY_START),
        seed=job["seed"],
        device="cpu",
    )

    for step, rows in enumerate(log.numbers):
        activations = x[rows]
        start = time.perf_counter()
        activations /= factor
        trainer.update(step, activations)
        log.seconds.append(time.perf_counter() - start)
        if log.due:
            log.look(lambda part: trainer.ae(part / factor) * factor)
    return log.result(
        "dictionary_learning",
        version("dictionary-learning"),
        trainer.lr,
        optimizer="adam",
        warmup_steps=trainer.warmup_steps,
        decay_start=trainer.decay_start,
        norm_factor=factor,
        auxk_alpha=trainer.auxk_alpha,
        dead_feature_threshold=trainer.dead_feature_threshold,
        threshold_start_step=trainer.threshold_start_step,
    )


if __name__ == "__main__":
    run(train)
