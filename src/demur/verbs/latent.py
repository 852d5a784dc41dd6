"""`demur latent`: cards of latents, as JSON and as pages: what each reads, says and causes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from demur import progress
from demur.data.corpus import Corpus
from demur.data.prompts import load_prompts, take
from demur.errors import InputError
from demur.eval.statistics import bootstrap_mean
from demur.features.card import Curve, Text, cards
from demur.features.describe import describe
from demur.features.openings import find_openings
from demur.features.referee import Referee
from demur.judges.rules import RulesJudge
from demur.lm.answers import answers
from demur.lm.chat import chat_ids, with_system
from demur.lm.generate import Answer
from demur.lm.hookpoints import device_at
from demur.lm.load import LanguageModel, load
from demur.lm.token_types import Typed
from demur.record import write_json, write_text
from demur.report.card import render
from demur.sae.store import LoadedSae, check_fits, load_sae
from demur.spec import Edit, SteeringSpec
from demur.types import UNSTEERED, Completion, CurvePoint, FeatureCard, Hookpoint, Label, Prompt, parse_hookpoint
from demur.verbs.config import Latent
from demur.verbs.documents import rows
from demur.verbs.sae_eval import OWN_TEXT, model_for, own_text

VALUES = (0, 2, 4, 6, 8, 10, 12)
"""Clamp values of the curve, in latent units."""
_PROMPTS = 32
"""Prompts of each of demur's own sets in the default text, under both system prompts."""
_HARMFUL, _PLAIN = 24, 12
"""Select prompts whose answers show how the model refuses, and how it answers."""
_MEASURED = 8
"""Of each, those on which the curve is measured."""
_ANSWER_TOKENS = 28
_TOGETHER = 32


def latent(config: Latent) -> list[FeatureCard]:
    """Make the cards, in the order asked for, and write `latent-N.json` and `latent-N.html` of each.

    Where the curve cannot be measured it is left out, and a note says why. Cards are written before they are described,
    so that an endpoint that fails loses only the descriptions. Raises `InputError` for a latent that the SAE has not,
    before the model is loaded; else as `load_sae`, `load`, `check_fits`, `Corpus`, `cards` and `describe` do.
    """
    loaded = load_sae(config.sae)
    if (largest := max(config.latent)) >= loaded.sae.d_sae:
        raise InputError(f"latent is {largest}, but the SAE {loaded.path!r} has {loaded.sae.d_sae}, numbered from 0")
    lm = load(model_for(loaded, config.model), device=config.device)
    hookpoint = parse_hookpoint(loaded.config.hookpoint)
    place = device_at(lm.model, hookpoint)
    check_fits(loaded, lm.name, lm.fingerprint, lm.d_model, lm.n_blocks)
    loaded.sae.to(place)
    reference = text(lm, config)
    progress.say("causal curve")
    curves, notes = {}, []
    try:
        curves = curve(lm, loaded, hookpoint, config.latent, config.system)
    except InputError as error:
        notes = [f"What clamping does was not measured: {error}."]
    made = cards(lm, loaded, hookpoint, reference, config.latent, config.examples, curves, notes)
    written = [_write(card, config) for card in made]
    return [_write(_described(card, config), config) for card in written] if config.endpoint else written


def _described(card: FeatureCard, config: Latent) -> FeatureCard:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    line = describe(card, config.endpoint, config.endpoint_model, key)
    return replace(card, description=line, description_model=config.endpoint_model)


def _write(card: FeatureCard, config: Latent) -> FeatureCard:
    page = config.out / f"latent-{card.latent}.html"
    card = replace(card, report=str(page.resolve()))
    write_json(page.with_suffix(".json"), card)
    write_text(page, render(card))
    return card


def text(lm: LanguageModel, config: Latent) -> Text:
    """The reference text that `config` asks for. Raises as `Corpus`, and `InputError` where the files hold no text."""
    if not config.data:
        own = own_text(lm, _PROMPTS)
        return Text(own, range(len(own)), OWN_TEXT)
    found: list[Typed] = []
    documents: list[int] = []
    left = config.max_tokens
    corpus = enumerate(Corpus(config.data))
    for number, row in ((number, row) for number, document in corpus for row in rows(lm, document, config.context)):
        left -= len(row.ids)
        if left < 0:
            break
        found.append(row)
        documents.append(number)
    if not found:
        raise InputError(
            f"the text files hold no document of two tokens or more, or their first has more than {config.max_tokens}; "
            "give more text, or raise --max-tokens"
        )
    return Text(found, documents, ", ".join(path.name for path in config.data))


def curve(
    lm: LanguageModel, loaded: LoadedSae, hookpoint: Hookpoint, latents: Sequence[int], system: str
) -> dict[int, Curve]:
    """What clamping each of `latents` to `VALUES` does, on demur's own select prompts.

    Raises `InputError` where the model's refusals cannot be told from its answers, or where it answers nothing.
    """
    harmful = take(load_prompts("harmful", "harmful"), "select", _HARMFUL)
    plain = take(load_prompts("plain", "benign"), "select", _PLAIN)
    said = _answers(lm, [*harmful, *plain], system)
    to_harmful, to_plain = said[: len(harmful)], said[len(harmful) :]
    judged: dict[Label, list[list[int]]] = defaultdict(list)
    for prompt, one in zip(harmful, to_harmful, strict=True):
        judged[_label(prompt, one.answer)].append(one.answer.ids)
    refused = judged["refused"]
    try:
        openings = find_openings(refused, [*judged["complied"], *(one.answer.ids for one in to_plain)])
    except InputError:
        raise InputError(
            f"{lm.name} refuses {len(refused)} of {len(harmful)} harmful prompts, and no refusal begins otherwise than "
            "its answers"
        ) from None
    benign = [(one.row, one.answer.ids) for one in to_plain if one.answer.ids][:_MEASURED]
    if not benign:
        raise InputError(f"{lm.name} answers none of {len(plain)} plain prompts, so there is nothing to measure KL on")
    asked = [one.row for one in to_harmful[:: len(harmful) // _MEASURED]]
    referee = Referee(lm, hookpoint, openings, asked, benign, [loaded])
    clamps = [Edit(str(hookpoint), loaded.hash, (one,), value) for one in latents for value in VALUES]
    specs = [SteeringSpec(), *(SteeringSpec((clamp,)) for clamp in clamps)]
    refusal, damage = referee.log_odds(specs), referee.damage(specs)
    changes = (refusal[1:] - refusal[0], damage.log_odds[1:] - damage.log_odds[0], damage.kl[1:])
    points = [
        CurvePoint(clamp.value, *(number for change in changes for number in bootstrap_mean(change[i].tolist())))
        for i, clamp in enumerate(clamps)
    ]
    n = len(VALUES)
    return {
        one: Curve(tuple(points[i * n : (i + 1) * n]), referee.n_harmful, referee.n_benign)
        for i, one in enumerate(latents)
    }


class _Said(NamedTuple):
    row: list[int]
    """Token ids of the prompt."""
    answer: Answer


def _answers(lm: LanguageModel, prompts: Sequence[Prompt], system: str) -> list[_Said]:
    """What the unsteered model says to `prompts`."""
    rows = [chat_ids(lm, with_system(prompt, system)) for prompt in prompts]
    with progress.track("answers", len(rows), "prompts") as advance:
        found = answers(lm, rows, _ANSWER_TOKENS, _TOGETHER, advance)
    return [_Said(row, answer) for row, answer in zip(rows, found, strict=True)]


def _label(prompt: Prompt, answer: Answer) -> Label:
    completion = Completion(prompt.id, UNSTEERED, answer.text, len(answer.ids), answer.stop)
    return RulesJudge().judge(prompt, completion).label
