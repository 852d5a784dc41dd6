"""A steered model as lm-eval sees one. Needs the extra `demur[eval]`; written against lm-eval 0.4.13."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from demur import progress
from demur.errors import InputError
from demur.eval.likelihood import Request, Score, log_likelihoods
from demur.eval.until import write_until
from demur.lm.batches import Row
from demur.lm.load import LanguageModel
from demur.sae.base import Sae
from demur.sae.store import LoadedSae
from demur.spec import SteeringSpec
from demur.steering.steer import steer
from demur.steering.vectors import Vector

_PLAIN: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "stop_strings": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "cache_implementation": (None,),
    "prompt_lookup_num_tokens": (None,),
    "exponential_decay_length_penalty": (None,),
}
"""Generation settings under which text may be written a few tokens at a time."""


class Together:
    """Specs that answer the same requests: what several share is computed once, when the first of them is asked."""

    def __init__(
        self,
        lm: LanguageModel,
        specs: Sequence[SteeringSpec],
        saes: Mapping[str, Sae] | Sequence[LoadedSae],
        batch_size: int,
        directions: Sequence[Vector] = (),
    ) -> None:
        self.lm, self.specs, self.saes, self.directions = lm, list(specs), saes, directions
        self.batch_size = batch_size
        self.pairs: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        """Token ids of contexts and continuations that were asked for."""
        self._found: dict[int, list[list[Score]]] = {}

    def scores(self, number: int, requests: Sequence[Request]) -> list[Score]:
        """Of every request under spec `number`."""
        key = hash(tuple((tuple(request.context), tuple(request.continuation)) for request in requests))
        if key not in self._found:
            with progress.track("likelihoods", len(requests) * len(self.specs), "answers") as advance:
                self._found[key] = log_likelihoods(
                    self.lm, requests, self.specs, self.saes, self.batch_size, advance, self.directions
                )
        return self._found[key][number]


class SteeredLM(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model under one of the specs of `together`.

    Log-likelihoods and greedy text are those of lm-eval's own class, but what requests have in common is run once, and
    texts that are done leave their batch. What else lm-eval may ask for (sampling, beams) goes through its own code
    inside `steer`. Continuations count as written by the model.
    """

    def __init__(self, together: Together, number: int = 0, max_length: int | None = None) -> None:
        # lm-eval gives the tokenizer a padding token where it has none
        tokenizer = deepcopy(together.lm.tokenizer)
        super().__init__(
            pretrained=together.lm.model,
            tokenizer=tokenizer,
            batch_size=together.batch_size,
            max_length=max_length,
            backend="causal",
        )
        self._together, self._number = together, number
        # the choices of a question come one after the other, each with the same context
        self._encoded: Callable[[str], list[int]] = lru_cache(maxsize=4)(super().tok_encode)
        self._advance: Callable[[float], None] = lambda amount: None

    def _steered(self) -> Any:
        group = self._together
        return steer(group.lm, group.specs[self._number], group.saes, directions=group.directions)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        with progress.track("texts", len(requests), "texts") as advance:
            self._advance = advance
            return super().generate_until(requests, disable_tqdm=True)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        if args or kwargs:
            encoded: list[int] = super().tok_encode(string, *args, **kwargs)
            return encoded
        return self._encoded(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval's, once for all specs."""
        pairs, pair = self._together.pairs, (context, continuation)
        if pair not in pairs:
            pairs[pair] = super()._encode_pair(context, continuation)
        return pairs[pair]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-probability and greediness of each (_, context, continuation); as in lm-eval, a request that is too long
        for the model loses its beginning (the last token is never read, so one more than fits is kept)."""
        asked, long = [], 0
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(
                    f"a choice of {len(continuation)} tokens was to be scored, but {self._together.lm.name} reads 1 to "
                    f"{self.max_length}; leave its task out"
                )
            room = self.max_length + 1 - len(continuation)
            long += len(context) > room
            asked.append(Request(context[-room:], continuation))
        if long:
            progress.say(f"  {long} of {len(asked)} prompts are too long for the model and lose their beginning")
        return [(score.log_prob, score.greedy) for score in self._together.scores(self._number, asked)]

    def _model_call(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._steered():
            logits: Tensor = super()._model_call(*args, **kwargs)
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        """[batch, pos] token ids, `context` [batch, columns] first, which is padded on the left."""
        try:
            if not self._greedy(kwargs):
                with self._steered():
                    sampled: Tensor = super()._model_generate(context, max_length, stop, **kwargs)
                return sampled
            rows = [row[seen].tolist() for row, seen in zip(context, kwargs["attention_mask"].bool(), strict=True)]
            stops = [one for one in stop if one]

            def done(tokens: Row) -> bool:
                text = self.tok_decode(tokens)
                return any(one in text for one in stops)

            with self._steered():
                written = write_until(self._together.lm, rows, max_length - context.shape[1], done)
            width = max(map(len, written))
            padded = [[*tokens, *[self.tokenizer.pad_token_id] * (width - len(tokens))] for tokens in written]
            return torch.cat([context, torch.tensor(padded, device=context.device)], dim=1)
        finally:
            self._advance(len(context))

    def _greedy(self, kwargs: dict[str, Any]) -> bool:
        """Neither the task nor the model's own settings ask for more than the likeliest token each time."""
        settings = self.model.generation_config
        plain = all(getattr(settings, name, None) in usual for name, usual in _PLAIN.items())
        chosen = kwargs.get("do_sample") or kwargs.get("temperature")
        return plain and not chosen and set(kwargs) <= {"attention_mask", "do_sample", "temperature", "top_p", "top_k"}
