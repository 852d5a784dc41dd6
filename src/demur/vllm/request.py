"""How a request names its spec, inside vLLM: as JSON text in the sampling parameters, put there once it was checked."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache

from demur.record import to_json
from demur.spec import Positions, SteeringSpec, TextGate
from demur.steering.spec_file import parse_spec

FIELD = "demur_spec"
"""In `SamplingParams.extra_args`, and in `vllm_xargs` over HTTP."""


@lru_cache(maxsize=4096)
def spec_text(spec: SteeringSpec) -> str:
    """`spec` as JSON text, for `read_spec_text`."""
    return json.dumps(to_json(spec), sort_keys=True)


@lru_cache(maxsize=4096)
def read_spec_text(text: str) -> SteeringSpec:
    """The spec that `spec_text` wrote."""
    return parse_spec(json.loads(text))


def cache_salt(spec: SteeringSpec, prompt: int, given: str | None) -> str:
    """What the hashes of a request's KV blocks are salted with, so that it shares blocks only with requests whose
    tokens were steered alike.

    `prompt`: tokens of the prompt. Where positions depend on its end, so do the KV blocks: what an answer was in one
    turn is prompt in the next. `given`: the client's own salt.
    """
    looks = [spec.positions]
    if spec.gate is not None and not isinstance(spec.gate, TextGate):
        looks.append(spec.gate.positions)
    end = str(prompt) if any(map(_depends_on_end, looks)) else ""
    return hashlib.sha256("\0".join((given or "", spec.hash, end)).encode()).hexdigest()


def _depends_on_end(positions: Positions) -> bool:
    return positions.where in ("prompt", "generation", "answer", "last_prompt_token")
