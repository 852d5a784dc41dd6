"""Ways to run vLLM under which demur would steer wrongly or not at all: each ends the start with a sentence."""

from __future__ import annotations

from typing import Any

from demur.errors import InputError
from demur.spec import SteeringSpec
from demur.vllm.blocks import check_model_type


def check_config(vllm_config: Any) -> None:
    """Raise `InputError` for the first setting of a `VllmConfig` that demur does not work with."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    unfit = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "the V2 model runner (start vLLM with VLLM_USE_V2_MODEL_RUNNER=0)": vllm_config.use_v2_model_runner,
        "LoRA": vllm_config.lora_config is not None,
        "KV transfer between servers": vllm_config.kv_transfer_config is not None,
        "dual-batch overlap": getattr(parallel, "use_ubatching", False),
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "sharing of KV caches in prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        "a model that does not generate text": model.runner_type != "generate",
        "an encoder-decoder model": model.is_encoder_decoder,
        "a diffusion model": getattr(vllm_config, "diffusion_config", None) is not None,
    }
    for what, given in unfit.items():
        if given:
            raise InputError(f"demur's plugin does not work with {what}; start vLLM without it, or without DEMUR_SPECS")
    check_model_type(str(model.hf_text_config.model_type))


def check_parallel(spec: SteeringSpec, vllm_config: Any) -> None:
    """Raise `InputError` for a gate in a pipeline: what it decides is known to its own stage only."""
    if spec.gate is not None and vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise InputError(
            "the spec has a gate, which the stages of a pipeline cannot share; use tensor parallelism, or a spec "
            "without a gate"
        )
