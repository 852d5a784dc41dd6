"""The judge that a config names: the rules, or a rubric with a model behind it, here or at an endpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from demur import progress
from demur.endpoint import Endpoint
from demur.errors import InputError
from demur.eval.agreement import Measure
from demur.judges.base import Advance, Asked, Judge, Say
from demur.judges.model import ModelJudge
from demur.judges.registry import RUBRICS, find_rubric
from demur.judges.rules import RulesJudge
from demur.lm.answers import answers
from demur.lm.chat import chat_ids, text_ids
from demur.lm.continuous import write
from demur.lm.load import LanguageModel, load
from demur.lm.sampling import Sampling
from demur.verbs.judge_config import JudgedBy


class Chosen(NamedTuple):
    """A judge, and what it does."""

    judge: Judge
    measures: Measure
    unwrapped: bool
    """It wants requests without the jailbreak around them."""


def chosen(config: JudgedBy) -> Chosen:
    """The judge of `config`; a model is loaded. Raises `InputError` where none is named, else as `load`, `Endpoint`."""
    if config.judge == "rules":
        return Chosen(RulesJudge(), "refusal", False)
    rubric = find_rubric(config.judge)
    model = config.judge_model or rubric.model
    if not model:
        raise InputError(f"the rubric {rubric.name} is for any good chat model; name one with --judge-model")
    if config.endpoint:
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        endpoint = Endpoint(
            config.endpoint, model, key, max_tokens=rubric.max_tokens, concurrency=config.concurrency, timeout=120
        )
        return Chosen(ModelJudge(rubric, endpoint.say, model), rubric.measures, rubric.unwrapped)
    lm = load(model, config.dtype, config.device)
    say = local(lm, rubric.max_tokens, config.batch_size)
    return Chosen(ModelJudge(rubric, say, lm.name), rubric.measures, rubric.unwrapped)


def measure_of(judge: str) -> Measure:
    """What the judge of that name measures; refusal, if it is none of ours."""
    rubric = RUBRICS.get(judge.partition("@")[0])
    return rubric.measures if rubric else "refusal"


def local(lm: LanguageModel, max_tokens: int, batch_size: int, temperature: float = 0.0) -> Say:
    """Ask a model that is loaded: greedily, or drawn anew each time; raw text with the tokenizer's own special tokens.

    What does not fit its context has an empty reply: without its beginning or its end a rubric is another one.
    """

    def say(asked: Sequence[Asked], advance: Advance) -> list[str]:
        rows = [text_ids(lm, one, special=True) if isinstance(one, str) else chat_ids(lm, one) for one in asked]
        fit = [i for i, row in enumerate(rows) if lm.context is None or len(row) + max_tokens <= lm.context]
        if too_long := len(rows) - len(fit):
            progress.say(f"{too_long} texts to answer are longer than the {lm.context} tokens {lm.name} reads")
            advance(too_long)
        some = [rows[i] for i in fit]
        if temperature:
            drawn = write(lm, some, Sampling(max_tokens, temperature), batch_size)
            texts = [str(lm.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in drawn]
            advance(len(some))
        else:
            texts = [one.text for one in answers(lm, some, max_tokens, batch_size, advance)]
        found = dict(zip(fit, texts, strict=True))
        return [found.get(i, "") for i in range(len(rows))]

    return say
