"""Benchmarks through lm-eval, under one or several specs: its prompts and metrics, our forward passes.

lm-eval is an extra (`demur[eval]`) and is imported when the first task runs. Its cache of answers is never used: it
does not know one steered model from another.
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from demur.errors import InputError, MissingExtraError
from demur.lm.load import LanguageModel
from demur.sae.base import Sae
from demur.sae.store import LoadedSae
from demur.spec import SteeringSpec
from demur.steering.vectors import Vector
from demur.types import TaskSample

if TYPE_CHECKING:
    from demur.eval.steered_lm import SteeredLM

_PER = {"word_perplexity": "nats_per_word", "byte_perplexity": "nats_per_byte"}
"""Metrics over whole corpora that become a number for each document."""


def run_tasks(
    lm: LanguageModel,
    spec: SteeringSpec | Sequence[SteeringSpec],
    saes: Mapping[str, Sae] | Sequence[LoadedSae],
    tasks: Sequence[str] | Mapping[str, Any],
    data_dir: Path | None = None,
    limit: int = 0,
    batch_size: int = 16,
    directions: Sequence[Vector] = (),
    chat: bool = False,
) -> list[TaskSample]:
    """Run lm-eval's `tasks`, names or what `load_tasks` gives, under `spec`, or under each of several, which is cheaper
    than one after the other.

    `data_dir`: folder of data sets; what it lacks comes from the hub. `limit`: only the first so many documents of each
    task, of MMLU of each subject; 0 for all. `chat`: few-shot examples as turns of a conversation in the model's chat
    template, which is needed for specs with a system prompt; without it prompts are plain text, as in most published
    numbers.

    A row for each task, document, metric and spec. Metrics are lm-eval's, with a filter after a comma
    (`exact_match,strict-match`); where a filter may find no answer, `parsed,FILTER` is 1 where it found one. Perplexity
    is `nats_per_word` and `nats_per_byte`. Metrics that only a whole set has (F1) and values that are no number are
    left out. Raises `MissingExtraError` without lm-eval, `InputError` for an unknown task, `NotFoundError` for data
    that cannot be found, and as `steer` does.
    """
    specs = [spec] if isinstance(spec, SteeringSpec) else list(spec)
    if any(one.system for one in specs) and not chat:
        raise InputError(
            "a spec has a system prompt, but tasks are asked as plain text, where it has no place; "
            "give chat=True, or leave the system prompt out"
        )
    require_lm_eval()
    from lm_eval.evaluator import evaluate

    from demur.eval.steered_lm import SteeredLM, Together
    from demur.eval.tasks import load_tasks, quiet, seed_shots

    found: list[TaskSample] = []
    with quiet(), _seeded():
        loaded = tasks if isinstance(tasks, Mapping) else load_tasks(tasks, data_dir)
        for system in dict.fromkeys(one.system for one in specs):
            group = [one for one in specs if one.system == system]
            together = Together(lm, group, saes, batch_size, directions)
            for number, one in enumerate(group):
                seed_shots(loaded)
                with _seeded():
                    results = evaluate(
                        SteeredLM(together, number),
                        {"tasks": loaded},
                        limit=limit or None,
                        bootstrap_iters=0,
                        system_instruction=system or None,
                        apply_chat_template=chat,
                        fewshot_as_multiturn=chat,
                    )
                found += _samples(results["samples"], one)
    return found


def steered_lm(
    lm: LanguageModel,
    spec: SteeringSpec,
    saes: Mapping[str, Sae] | Sequence[LoadedSae] = (),
    batch_size: int = 16,
    directions: Sequence[Vector] = (),
    max_length: int | None = None,
) -> SteeredLM:
    """`lm` under `spec` as a model for `lm_eval.simple_evaluate`; do not give that a `use_cache`.

    Raises `MissingExtraError` without lm-eval.
    """
    require_lm_eval()
    from demur.eval.steered_lm import SteeredLM, Together
    from demur.eval.tasks import quiet

    with quiet():
        return SteeredLM(Together(lm, [spec], saes, batch_size, directions), max_length=max_length)


def require_lm_eval() -> None:
    """Raises `MissingExtraError` without lm-eval."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm-eval is not installed; run `pip install 'demur[eval]'`")


def _samples(logged: Mapping[str, Iterable[Mapping[str, Any]]], spec: SteeringSpec) -> Iterator[TaskSample]:
    """One row for each number in what lm-eval logged."""
    for task, rows in logged.items():
        for row in rows:
            for metric, value in _values(row):
                yield TaskSample(
                    task=task,
                    doc=int(row["doc_id"]),
                    metric=metric,
                    value=value,
                    spec=spec.hash,
                    doc_hash=str(row["doc_hash"]),
                    prompt_hash="" if spec.system else str(row["prompt_hash"]),
                )


def _values(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Metrics of one document that are a number."""
    suffix = "" if row["filter"] == "none" else f",{row['filter']}"
    for metric in row["metrics"]:
        value = row[metric]
        if metric in _PER:
            log_prob, units = value
            metric, value = _PER[metric], -log_prob / units
        if isinstance(value, int | float | np.number) and math.isfinite(value):
            yield f"{metric}{suffix}", float(value)
    if suffix:
        yield f"parsed{suffix}", float("[invalid]" not in row["filtered_resps"])


@contextmanager
def _seeded() -> Iterator[None]:
    """The global generators that tasks may draw from, at lm-eval's own seeds; put back after the block."""
    before, numbers = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numbers)
