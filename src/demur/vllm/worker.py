"""demur in a worker process of vLLM: it makes the room, hooks the blocks, and tells the op what each step holds."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from torch import nn

from demur.errors import InputError, MismatchError
from demur.spec import SteeringSpec
from demur.vllm.accept import check_named
from demur.vllm.blocks import find_blocks, hook
from demur.vllm.buffers import Buffers
from demur.vllm.needs import make_plan
from demur.vllm.offered import Known, read_known
from demur.vllm.op import PLACES, define
from demur.vllm.outline import outline_of
from demur.vllm.patch import check_signature
from demur.vllm.refuse import check_config, check_parallel
from demur.vllm.request import FIELD, read_spec_text
from demur.vllm.requests import Requests
from demur.vllm.settings import Settings
from demur.vllm.table import Table
from demur.vllm.tally import Tally

_LOG = logging.getLogger("vllm.demur")
_LIVE: list[weakref.ref[nn.Module]] = []


def equip(worker: Any, settings: Settings) -> None:
    """Make `worker` (vLLM's, its device known, its model not loaded) steer.

    Raises `InputError` for a configuration or spec that cannot be carried out, before any weight is read.
    """
    config = worker.vllm_config
    check_config(config)
    device = worker.model_runner.device
    known = _on(read_known(settings), device)
    outline = outline_of(config, device)
    found = outline.artefacts(known)
    check_named(known, found)
    for spec in known.book.specs.values():
        check_parallel(spec, config)
    plan = make_plan(known, settings, outline)
    # what is compiled is stored under a hash of the configuration, and must not be taken for the plain model's
    config.additional_config = {
        **(config.additional_config or {}),
        "demur": {"op": 1, "blocks": plan.blocks, "d_model": outline.d_model},
    }
    check_signature(worker.load_model, ("load_dummy_weights",), optional=True)
    check_signature(worker.compile_or_warm_up_model, ())
    load, warm = worker.load_model, worker.compile_or_warm_up_model

    @wraps(load)
    def load_model(*args: Any, **kwargs: Any) -> Any:
        result = load(*args, **kwargs)
        static = device.type != "cpu" or settings.static
        capacity = len(known.book.specs) + config.scheduler_config.max_num_seqs + 8
        table = Table(plan, known, found, outline.d_model, capacity, device, static)
        tensor = config.parallel_config.tensor_parallel_size
        Steered(worker.model_runner, table, outline.n_blocks, device, worker.rank, tensor)
        return result

    @wraps(warm)
    def compile_or_warm_up_model(*args: Any, **kwargs: Any) -> Any:
        result = warm(*args, **kwargs)
        _check_called(worker.model_runner)
        return result

    worker.load_model = load_model
    worker.compile_or_warm_up_model = compile_or_warm_up_model


def _on(known: Known, device: torch.device) -> Known:
    """`known`, with SAEs that may be moved to `device`: those on the CPU may belong to the front end as well."""
    if device.type == "cpu":
        return known
    return known._replace(saes=tuple(replace(one, sae=deepcopy(one.sae)) for one in known.saes))


class Steered:
    """A model runner (vLLM's, V1) with its model loaded, whose steps are steered from here on."""

    def __init__(self, runner: Any, table: Table, n_blocks: int, device: torch.device, rank: int, tensor: int) -> None:
        """`rank` of `tensor` ranks that compute the same."""
        model = runner.get_model()
        _only_one(model)
        rows = runner.max_num_reqs + 8
        self._buffers = Buffers(runner.max_num_tokens, rows, len(table.labels), device)
        table.attach(self._buffers, device)
        self._requests = Requests(table, self._buffers, rows)
        define()
        here = hook(find_blocks(model, n_blocks), table.places)
        PLACES.clear()
        PLACES.update({block: table.places[block] for block in here})
        _LOG.info("demur steers at block %s by the specs %s", ", ".join(map(str, here)), ", ".join(table.labels))
        self._runner = runner
        self._tally = Tally(table.labels, self._requests, self._buffers, rank == 0) if rank % tensor == 0 else None
        check_signature(runner._prepare_inputs, ("scheduler_output", "num_scheduled_tokens"))
        check_signature(runner._dummy_run, ("num_tokens",))
        runner._prepare_inputs = partial(self._prepare_inputs, runner._prepare_inputs)
        runner._dummy_run = partial(self._dummy_run, runner._dummy_run)

    def _prepare_inputs(self, inner: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        result = inner(scheduler_output, num_scheduled_tokens)
        new = [one.req_id for one in scheduler_output.scheduled_new_reqs]
        self._requests.leave(new)
        self._requests.leave(scheduler_output.preempted_req_ids or ())
        self._requests.leave(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
        if new or scheduler_output.finished_req_ids:
            self._requests.keep(self._runner.requests.keys())
        batch = self._runner.input_batch
        n = batch.num_reqs
        self._requests.step(
            batch.req_ids[:n],
            np.asarray(num_scheduled_tokens, dtype=np.int64),
            batch.num_computed_tokens_cpu[:n].astype(np.int64),
            batch.num_prompt_tokens[:n].astype(np.int64),
            self._spec_of,
        )
        if self._tally is not None:
            self._tally.report()
        return result

    def _dummy_run(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        self._buffers.clear()
        return inner(*args, **kwargs)

    def _spec_of(self, one: str) -> SteeringSpec:
        params = self._runner.requests[one].sampling_params
        given: Mapping[str, Any] = (params.extra_args if params is not None else None) or {}
        if FIELD not in given:
            raise InputError(
                f"the request {one} reached the model without demur having seen it, so it would run unsteered; use "
                "vLLM's own Python front end"
            )
        return read_spec_text(str(given[FIELD]))


def _only_one(model: nn.Module) -> None:
    gc.collect()
    _LIVE[:] = [ref for ref in _LIVE if ref() is not None]
    if _LIVE:
        raise InputError(
            "a second model is loaded in a process where demur steers another, and the two would share one set of "
            "tables; delete the first, or load each in a process of its own"
        )
    _LIVE.append(weakref.ref(model))


def _check_called(runner: Any) -> None:
    """Raise `MismatchError` unless every hooked block has called the op, as it must have while the model warmed up."""
    if any(not place.calls for place in PLACES.values()):  # no warm-up was needed
        with torch.inference_mode():
            if hasattr(runner, "warming_up_model"):
                runner.warming_up_model()
            if any(not place.calls for place in PLACES.values()):
                runner._dummy_run(min(16, runner.max_num_tokens))
    silent = [str(block) for block, place in PLACES.items() if not place.calls]
    if silent:
        raise MismatchError(
            f"block {', '.join(silent)} of the model ran without calling demur, so nothing would be steered there; "
            "delete vLLM's compile cache, or start with --enforce-eager, and report it"
        )
