"""Where demur reaches into vLLM: six functions, each replaced only if it looks as expected."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import partial
from importlib import import_module
from typing import Any

from demur.errors import DemurError, InputError
from demur.vllm.patch import check_version, wrap
from demur.vllm.settings import Settings
from demur.vllm.tally import FOLDER

_FRONTS: list[Any] = []
"""The last `Front` of this process, for parameters that are made before their request; empty in workers."""


def install(settings: Settings) -> None:
    """Make vLLM steer in this process. Calling it again does nothing.

    Raises `InputError` for a front end that demur does not see, `MismatchError` for a vLLM that it does not know.
    """
    check_version(import_module("vllm").__version__)
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0").lower() in ("1", "true"):
        raise InputError(
            "VLLM_USE_RUST_FRONTEND is set, but demur checks requests in vLLM's Python front end; unset it, or unset "
            "DEMUR_SPECS"
        )
    # the newer runner is the default on a GPU; demur's part of it has not been run, so the older one is asked for
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="demur-metrics-")
        atexit.register(shutil.rmtree, os.environ[FOLDER], ignore_errors=True)

    wrapper = import_module("vllm.v1.worker.worker_base").WorkerWrapperBase
    wrap(wrapper, "init_device", ("self",), partial(_init_device, settings))
    inputs = import_module("vllm.v1.engine.input_processor").InputProcessor
    wrap(inputs, "__init__", ("self", "vllm_config"), partial(_input_processor, settings))
    wrap(inputs, "process_inputs", ("self", "request_id", "prompt", "params", "supported_tasks"), _process_inputs)
    params = import_module("vllm.sampling_params").SamplingParams
    wrap(params, "_verify_extra_args", ("self",), _verify_extra_args)
    for kind in ("chat_completion", "completion"):
        protocol = import_module(f"vllm.entrypoints.openai.{kind}.protocol")
        request = protocol.ChatCompletionRequest if kind == "chat_completion" else protocol.CompletionRequest
        wrap(request, "to_beam_search_params", ("self", "max_tokens", "default_sampling_params"), _beams)
    offline = import_module("vllm.entrypoints.generate.beam_search.offline").BeamSearchOfflineMixin
    wrap(offline, "beam_search", ("self", "prompts", "params"), _beams)


def _init_device(settings: Settings, inner: Any, wrapper: Any) -> Any:
    from demur.vllm.worker import equip

    result = inner(wrapper)
    equip(wrapper.worker, settings)
    return result


def _input_processor(settings: Settings, inner: Any, processor: Any, *args: Any, **kwargs: Any) -> None:
    from demur.vllm.front import Front

    inner(processor, *args, **kwargs)
    processor.demur = Front(settings, processor.vllm_config)
    _FRONTS[:] = [processor.demur]


def _process_inputs(inner: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
    request = inner(processor, *args, **kwargs)
    try:
        processor.demur.mark(request)
    except DemurError as error:
        raise _refused(error) from error
    return request


def _verify_extra_args(inner: Any, params: Any) -> None:
    """While the parameters are made, because a streamed answer's status is sent before its request is processed."""
    inner(params)
    for front in _FRONTS:
        try:
            front.find(params.extra_args)
        except DemurError as error:
            raise _refused(error) from error


def _beams(inner: Any, asked: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM gives a beam's parts neither the request's own fields nor its prompt's length."""
    for front in _FRONTS:
        try:
            if front.default.edits or front.find(getattr(asked, "vllm_xargs", None)).edits:
                raise InputError("beam search cannot be steered; use sampling, or the spec unsteered where none is set")
        except DemurError as error:
            raise _refused(error) from error
    return inner(asked, *args, **kwargs)


def _refused(error: DemurError) -> Exception:
    """What vLLM answers with status 400."""
    found: Exception = import_module("vllm.exceptions").VLLMValidationError(str(error), parameter="demur_spec")
    return found
