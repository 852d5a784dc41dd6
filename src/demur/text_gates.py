"""Gates that read text: a classifier is asked about a conversation before the model runs.

`demur.steer` sees tokens and cannot decide a `TextGate`. Whoever formats the conversation calls `decide` and steers
each row by what comes back; answers are labelled by the spec as it was, gate and all.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from threading import Lock
from typing import Any

import torch

from demur.endpoint import Endpoint
from demur.errors import InputError, NotFoundError
from demur.lm.quiet import quiet_transformers
from demur.spec import SteeringSpec, TextGate
from demur.types import Message

KEY = "DEMUR_MODERATION_KEY"
"""Environment variable of the endpoint's key. Not OPENAI_API_KEY: a spec is a file that people pass on, and must not
name the address that a key meant for another one is sent to."""
_MODERATION = "moderation:"
_BATCH = 16
"""Pieces of text that a classifier reads at once."""
_REMEMBERED = 10_000
"""Texts of which the scores are kept, so that a message is read once and not once a turn, a spec and a measure."""
_TIMEOUT = 20.0
"""Seconds for one try at an endpoint."""
_HELLO = (Message("user", "Hello"),)

Scores = dict[str, float]
"""From 0 to 1, by class or category, in the classifier's order."""


def decide(
    specs: Sequence[SteeringSpec], conversations: Sequence[Sequence[Message]], device: torch.device | str = "cpu"
) -> list[SteeringSpec]:
    """What the text gates of `specs` make of them, each about its own conversation: the spec without the gate where it
    opens, nothing but its system prompt where it stays shut. Specs without a text gate are given back.

    Every message of the user is read by itself, and the gate opens if one of them scores above its threshold: so a gate
    that has opened in one turn is open in all later ones, and a long harmless talk thins nothing out. A conversation
    without such messages is read whole, message by message. A message that is longer than a classifier's context is
    read in pieces that overlap, and the largest score counts. What an edit does within the row is up to the spec's
    positions, which may lie before the message that opened the gate.

    `device`: where classifiers of Hugging Face run. Raises `NotFoundError` for a classifier that is not there or does
    not answer, `InputError` for one that has no such label or gives no scores, `MissingExtraError` for an endpoint
    without `demur[endpoint]`. It never gives back an unsteered spec because asking failed.
    """
    gates = [one.gate if isinstance(one.gate, TextGate) else None for one in specs]
    texts = [_read(talk) if gate else [] for gate, talk in zip(gates, conversations, strict=True)]
    scores: dict[tuple[str, str], Scores] = {}
    for name in dict.fromkeys(gate.classifier for gate in gates if gate):
        asked = [
            text for gate, some in zip(gates, texts, strict=True) if gate and gate.classifier == name for text in some
        ]
        asked = list(dict.fromkeys(asked))
        scores |= {(name, text): one for text, one in zip(asked, _reader(name, str(device))(asked), strict=True)}
    found = []
    for spec, gate, some in zip(specs, gates, texts, strict=True):
        if gate is None:
            found.append(spec)
        elif any(_score(gate, scores[gate.classifier, text]) > gate.threshold for text in some):
            found.append(opened(spec))
        else:
            found.append(SteeringSpec(system=spec.system))
    return found


def decide_each(
    specs: Sequence[SteeringSpec], conversations: Sequence[Sequence[Message]], device: torch.device | str = "cpu"
) -> dict[str, list[SteeringSpec]]:
    """For each of `specs` that has a text gate, by its hash, what `decide` makes of it for every conversation."""
    return {
        spec.hash: decide([spec] * len(conversations), conversations, device)
        for spec in specs
        if isinstance(spec.gate, TextGate)
    }


def opened(spec: SteeringSpec) -> SteeringSpec:
    """The spec as it is where its text gate, if it has one, is open."""
    return replace(spec, gate=None) if isinstance(spec.gate, TextGate) else spec


def check(specs: Sequence[SteeringSpec], device: torch.device | str = "cpu") -> None:
    """Ask each classifier once, about a greeting. Raises as `decide`: now, and not when the first answer is wanted."""
    decide(specs, [_HELLO] * len(specs), device)


def _read(talk: Sequence[Message]) -> list[str]:
    """The texts that a gate reads; blank ones are not asked about."""
    said = [turn.content for turn in talk if turn.role == "user"] or [turn.content for turn in talk]
    return [text for text in said if text.strip()]


def _score(gate: TextGate, scores: Scores) -> float:
    """Of the class or category that the gate reads. Raises `InputError` where there is none of this name."""
    labels = list(scores)
    if gate.label in scores:
        found = scores[gate.label]
    elif gate.label.isdecimal() and int(gate.label) < len(labels):
        found = scores[labels[int(gate.label)]]
    elif gate.label:
        raise InputError(f"the gate reads {gate.label!r}, but {gate.classifier} scores {', '.join(labels)}; name one")
    elif gate.classifier.startswith(_MODERATION):
        found = max(scores.values())
    elif len(labels) > 2:
        raise InputError(f"the gate names no label, but {gate.classifier} scores {', '.join(labels)}; name one")
    else:
        found = scores[labels[-1]]
    if not math.isfinite(found):
        raise InputError(f"{gate.classifier} gives no number for a message, so its gate cannot be decided; use another")
    return found


@lru_cache(maxsize=8)
def _reader(name: str, device: str) -> Callable[[Sequence[str]], list[Scores]]:
    """What scores texts, loaded once."""
    if name.startswith(_MODERATION):
        url, _, model = name.removeprefix(_MODERATION).rpartition("#")
        if not url:
            raise InputError(f"the gate's classifier is {name!r}, expected moderation:URL#MODEL")
        key = os.environ.get(KEY, "").strip()
        if not key.isascii() or not (key or " ").isprintable():
            raise InputError(f"{KEY} holds characters that no key has; set it anew")
        endpoint = Endpoint(url, model, key, timeout=_TIMEOUT)
        return _Remembering(endpoint.moderate)
    return _Remembering(_Classifier(name, device))


class _Remembering:
    """Asks about each text once."""

    def __init__(self, ask: Callable[[Sequence[str]], list[Scores]]) -> None:
        self._ask = ask
        self._known: dict[bytes, Scores] = {}
        self._lock = Lock()

    def __call__(self, texts: Sequence[str]) -> list[Scores]:
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        with self._lock:
            found = {key: self._known[key] for key in keys if key in self._known}
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        if new:
            found |= zip(new, self._ask(list(new.values())), strict=True)
            with self._lock:
                self._known |= {key: found[key] for key in new}
                for key in list(self._known)[: max(0, len(self._known) - _REMEMBERED)]:
                    del self._known[key]
        return [found[key] for key in keys]


class _Classifier:
    """A text classifier of Hugging Face."""

    def __init__(self, name: str, device: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        with quiet_transformers():
            try:
                self._tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
                loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                    name, trust_remote_code=False, output_loading_info=True
                )
                model, info = loaded
                self._model: Any = model.eval().to(device)
            except Exception as error:  # OSError, ValueError, SafetensorError, RuntimeError, ...
                why = str(error).strip().splitlines() or [type(error).__name__]
                raise NotFoundError(
                    f"the gate's classifier {name!r} could not be loaded ({why[0]:.200}); give the folder or hub id of "
                    "a model for text classification, or moderation:URL#MODEL"
                ) from error
        config = self._model.config
        if missing := sorted(info["missing_keys"]):
            raise InputError(
                f"the gate's classifier {name!r} lacks {len(missing)} of its weights ({missing[0]} and so on), which "
                "would be random; give a model that was trained for text classification"
            )
        if config.problem_type == "regression" or not self._tokenizer.is_fast:
            what = "is a regression" if self._tokenizer.is_fast else "has a slow tokenizer"
            raise InputError(f"the gate's classifier {name!r} {what}, which is not supported; give another")
        self._labels = [str(config.id2label[i]) for i in range(config.num_labels)]
        self._single = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        # two fewer than there are positions, as RoBERTa's begin at 2
        positions = getattr(config, "max_position_embeddings", None) or 514
        self._context = min(self._tokenizer.model_max_length, positions - 2)
        self._batch = _BATCH if None not in (self._tokenizer.pad_token, config.pad_token_id) else 1
        self._tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True  # said already, so not said again
        self._lock = Lock()  # a tokenizer's settings are shared by threads

    def __call__(self, texts: Sequence[str]) -> list[Scores]:
        """Of a text in several pieces the largest score of each class."""
        with self._lock, torch.inference_mode():
            read = self._tokenizer(
                list(texts),
                truncation=True,
                max_length=self._context,
                stride=self._context // 4,
                return_overflowing_tokens=True,
            )
            whose = read.pop("overflow_to_sample_mapping")
            names = [name for name in self._tokenizer.model_input_names if name in read]
            scores = []
            for start in range(0, len(whose), self._batch):
                some = {name: read[name][start : start + self._batch] for name in names}
                batch = self._tokenizer.pad(some, padding=self._batch > 1, return_tensors="pt")
                logits = self._model(**batch.to(self._model.device)).logits.float()
                scores.append((logits.sigmoid() if self._single else logits.softmax(-1)).cpu())
            pieces = torch.cat(scores)
            index = torch.tensor(whose).unsqueeze(1).expand_as(pieces)
            whole = torch.zeros(len(texts), len(self._labels)).scatter_reduce(0, index, pieces, "amax")
        return [dict(zip(self._labels, row, strict=True)) for row in whole.tolist()]
