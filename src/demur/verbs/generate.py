"""`demur generate`: answer prompts under a spec, shown as the model writes; each answer proves the spec was applied."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from demur.errors import InputError
from demur.lm.chat import chat_ids
from demur.lm.generate import AS_ASKED
from demur.lm.load import LanguageModel
from demur.lm.text_stream import TextStream
from demur.progress import say
from demur.spec import SteeringSpec
from demur.steering.steer import Steering, steer
from demur.text_gates import check, decide, opened
from demur.types import Message
from demur.verbs.config import Generate, Sampling
from demur.verbs.steered import Loaded, load_steered


@dataclass(frozen=True)
class Applied:
    """What the edit of one latent or direction did to a prompt and its answer."""

    name: str
    """`latent 12 of HASH`, or `direction HASH, add`."""
    hookpoint: str
    steered: int
    """Tokens on which the edit was in force."""
    changed: int
    """Tokens whose residual it moved."""
    mean_norm: float
    """Mean norm of those moves; 0 where there was none."""


@dataclass(frozen=True)
class Reply:
    """What a model said to one prompt under one spec."""

    prompt: str
    """The last user turn."""
    model: str
    spec: str
    """Spec hash, `unsteered` for the model as it is."""
    text: str
    tokens: int
    """Generated tokens, the end-of-turn token not counted."""
    stop: Literal["eos", "length"]
    applied: tuple[Applied, ...]
    """One for each edited latent or direction; empty when unsteered."""


class Stream:
    """A streamer for the `generate` of transformers: gives text to `write` as soon as it is certain.

    The pieces together are the whole answer, stripped: white space at the end is held back until more follows.
    """

    def __init__(self, lm: LanguageModel, write: Callable[[str], object]) -> None:
        self._lm, self._write = lm, write
        self._stream = TextStream(lm.tokenizer)
        self._decoded = ""
        self.ids: list[int] = []
        """Generated token ids so far, the end-of-turn token left off."""
        self.text = ""
        """What was written so far."""

    def put(self, value: Tensor) -> None:
        """Take the next token id [1]; the prompt, which comes first as [1, pos], is passed over."""
        if value.ndim > 1:
            return
        for token in value.tolist():
            if token not in self._lm.eos_ids:
                self.ids.append(token)
                self._show(self._stream.add(token))

    def end(self) -> None:
        """Write what was held back."""
        self._show(self._stream.end())

    def _show(self, more: str) -> None:
        self._decoded += more
        if new := self._decoded.strip()[len(self.text) :]:
            self._write(new)
            self.text += new


def generate(config: Generate) -> list[Reply]:
    """Answer every prompt, each as a conversation of its own, streaming to stdout (to stderr with `json`).

    With `compare` the unsteered answer comes before the steered one. Raises `InputError` for an empty prompt or
    stdin, and as `load_steered`, `steer` and `chat_ids` do; the model is itself again after any error or interrupt.
    """
    prompts = _prompts(config.prompts)
    loaded = load_steered(config.steered, need_spec=config.compare)
    try_out(loaded)
    out = sys.stderr if config.json else sys.stdout

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    # a spec's system prompt is part of the spec, so the unsteered model goes without it
    runs = [(SteeringSpec(), config.steered.system)] if config.compare else []
    runs.append((loaded.spec, loaded.system))
    replies: list[Reply] = []
    for prompt in prompts:
        if len(prompts) > 1:
            write(f"> {prompt}\n")
        for spec, system in runs:
            if config.compare:
                write(f"[{spec.hash}]\n")
            messages = conversation(system, [Message("user", prompt)])
            stream = Stream(loaded.lm, write)
            try:
                replies.append(answer(loaded, spec, messages, config.sampling, stream))
            except BaseException:  # whatever is said about it starts on a line of its own
                write("\n" if stream.text else "")
                raise
            write("\n")
            if spec.edits and not replies[-1].applied:
                say("  the gate stayed shut, so nothing was steered")
            for edit in replies[-1].applied:
                say(
                    f"  {edit.name} at {edit.hookpoint}: {edit.steered} tokens steered, {edit.changed} changed "
                    f"by {edit.mean_norm:.3g} on average"
                )
    return replies


def try_out(loaded: Loaded) -> None:
    """Raise what `steer`, `chat_ids` and a text gate have to say about this model and spec, before any answer."""
    check([loaded.spec], loaded.lm.device)
    with steer(loaded.lm, opened(loaded.spec), loaded.saes, directions=loaded.directions):
        chat_ids(loaded.lm, conversation(loaded.system, [Message("user", "Hello")]))


def conversation(system: str, turns: Sequence[Message]) -> list[Message]:
    """The turns after a system turn, where there is something to say in it."""
    return [*([Message("system", system)] if system else []), *turns]


def answer(
    loaded: Loaded, spec: SteeringSpec, messages: Sequence[Message], sampling: Sampling, stream: Stream
) -> Reply:
    """The model's answer to `messages` under `spec`, put into `stream` token by token.

    Through transformers' own `generate`. Sampling starts from the seed for every answer, so that no answer depends on
    the ones before it, and leaves torch's own random state alone. Raises as `steer` and `chat_ids` do, and
    `InputError` for a conversation that leaves no room for an answer.
    """
    lm = loaded.lm
    ids = torch.tensor([chat_ids(lm, messages)], device=lm.device)
    length = ids.shape[1]
    model: Any = lm.model  # transformers types `generate` as a tensor
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        # no top-k, which transformers would otherwise do at 50
        drawn = {"do_sample": True, "temperature": float(sampling.temperature), "top_p": float(sampling.top_p)}
        drawn |= {"top_k": 0, "min_p": None, "typical_p": 1.0}
    decided = decide([spec], [messages], lm.device)[0]
    with (
        torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))),
        steer(lm, decided, loaded.saes, directions=loaded.directions) as steering,
    ):
        torch.manual_seed(sampling.seed)
        whole = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            streamer=stream,
            max_new_tokens=_room(lm, length, sampling.max_new_tokens),
            **drawn,
            **AS_ASKED,
            pad_token_id=lm.pad_id,
            eos_token_id=sorted(lm.eos_ids) or None,
        )
    ended = int(whole[0, -1]) in lm.eos_ids
    return Reply(
        prompt=messages[-1].content,
        model=lm.name,
        spec=spec.hash,
        text=stream.text,
        tokens=len(stream.ids),
        stop="eos" if ended else "length",
        applied=_applied(steering),
    )


def _applied(steering: Steering) -> tuple[Applied, ...]:
    """The counts of a batch of one."""
    return tuple(
        Applied(slot.name, slot.hookpoint, sum(slot.steered), sum(slot.changed), sum(slot.mean_norm))
        for slot in steering.counts()
    )


def _room(lm: LanguageModel, length: int, wanted: int) -> int:
    """How many of the `wanted` tokens fit after a prompt of `length`; some models fail beyond their context."""
    context = lm.context
    if context is None:
        return wanted
    if length >= context:
        raise InputError(
            f"the conversation has {length} tokens, but {lm.name} reads at most {context} with its answer; "
            "shorten it, or begin a new one"
        )
    return min(wanted, context - length)


def _prompts(given: Sequence[str]) -> list[str]:
    """The prompts of the command line, with stdin where they say so."""
    prompts = [_read_stdin() if prompt == "-" else prompt for prompt in given or ("-",)]
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise InputError(f"prompt {number} is empty; give the user's words, or `-` to read them from stdin")
        try:
            prompt.encode()
        except UnicodeEncodeError:  # bytes of the command line that were no text
            raise InputError(f"prompt {number} is not UTF-8 text; write it in UTF-8") from None
    return prompts


def _read_stdin() -> str:
    if sys.stdin.isatty():
        say("reading the prompt from the terminal; end it with Ctrl-D on an empty line")
    try:
        text = sys.stdin.read().strip()
    except UnicodeDecodeError:
        raise InputError("stdin is not UTF-8 text; convert it to UTF-8 first") from None
    if not text:
        raise InputError("stdin is empty, but the prompt was to come from it; pipe one in, or give it as an argument")
    return text
