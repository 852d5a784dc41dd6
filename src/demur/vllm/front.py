"""demur in the process that takes requests: it finds each one's spec, refuses what cannot be carried out, and marks the
request for the scheduler and the workers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from demur.errors import DemurError, InputError
from demur.spec import SteeringSpec
from demur.vllm.accept import check_spec
from demur.vllm.metrics import Metrics
from demur.vllm.needs import Ledger, make_plan
from demur.vllm.offered import read_known
from demur.vllm.outline import outline_of
from demur.vllm.refuse import check_parallel
from demur.vllm.request import FIELD, cache_salt, spec_text
from demur.vllm.settings import Settings


class Front:
    """The specs of one server."""

    def __init__(self, settings: Settings, vllm_config: Any) -> None:
        self._settings, self._config = settings, vllm_config
        self._known = read_known(settings)
        outline = outline_of(vllm_config, torch.device("cpu"))
        self._found = outline.artefacts(self._known)
        processes = getattr(vllm_config.parallel_config, "_api_process_count", 1)
        self._ledger = Ledger(make_plan(self._known, settings, outline), processes)
        self._check = lru_cache(maxsize=4096)(self._checked)
        self._metrics = Metrics(self._known.book.specs)

    @property
    def default(self) -> SteeringSpec:
        """The spec of requests that name none."""
        return self._known.book.default

    def find(self, extra: dict[str, Any] | None) -> SteeringSpec:
        """The spec of a request with the sampling parameters' `extra_args`.

        Raises `InputError` and its kin for one that is unknown, malformed, forbidden or cannot be carried out, also for
        want of room.
        """
        try:
            given = extra or {}
            for key in given:
                if str(key).startswith("demur") and key != FIELD:
                    raise InputError(f"the request has the field {str(key)[:80]!r}, but the spec's is {FIELD!r}")
            spec = self._known.book.find([given.get(FIELD)])
            if spec not in self._known.book.specs.values() and spec != SteeringSpec():
                if not self._settings.inline:
                    raise InputError("this server takes specs by name only; name one of those that it offers")
                self._check(spec)
        except DemurError:
            self._metrics.refused()
            raise
        return spec

    def _checked(self, spec: SteeringSpec) -> None:
        check_spec(spec, self._found)
        check_parallel(spec, self._config)
        self._ledger.claim(spec)

    def mark(self, request: Any) -> None:
        """Write the spec into `request` (an `EngineCoreRequest`, which nobody else holds yet).

        Raises as `find`.
        """
        params = request.sampling_params
        if params is None:
            raise InputError("demur steers generated text only; serve pooling and embeddings without DEMUR_SPECS")
        spec = self.find(params.extra_args)
        if spec.edits:
            if request.resumable:
                raise InputError("a session that is fed in pieces has no fixed prompt; steer whole requests")
            ids, embeds = request.prompt_token_ids, request.prompt_embeds
            request.cache_salt = cache_salt(spec, len(ids if ids is not None else embeds), request.cache_salt)
            if spec.gate is not None:
                # the gate must see every token of the prompt, also those whose KV blocks are there already
                params.skip_reading_prefix_cache = True
        params.extra_args = {**(params.extra_args or {}), FIELD: spec_text(spec)}
        self._metrics.request(self._known.book.label(spec))
