"""GCG: a suffix to a request that makes an answer begin as the attacker wants (Zou et al. 2023, arXiv 2307.15043).

Greedy coordinate gradient, algorithm 1: the gradient of the loss with respect to the suffix's tokens proposes
replacements of one token, many of those are tried, and the best one stays. The nanogcg package does the same for
transformers below 4.48 only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from demur.errors import InputError
from demur.lm.caches import cache_argument, plain_layers
from demur.lm.chat import chat_text, text_ids
from demur.lm.load import LanguageModel
from demur.types import Message

_MARK = "SUFFIXHERE"
_START = " x"
_BATCH = 64
"""Candidates whose loss is computed together."""


class Suffix(NamedTuple):
    """What was found."""

    text: str
    """To be put after the request and a space."""
    loss: float
    """Nats per token of the wanted beginning, under the suffix."""
    start: float
    """The same under the suffix it began with."""


class _Around(NamedTuple):
    """What stands before and after the suffix, in token ids and as text."""

    before: list[int]
    after: list[int]
    target: list[int]
    texts: tuple[str, str]


def gcg(
    lm: LanguageModel,
    messages: Sequence[Message],
    target: str,
    steps: int = 250,
    width: int = 512,
    top: int = 256,
    length: int = 20,
    seed: int = 0,
    advance: Callable[[float], None] = lambda amount: None,
) -> Suffix:
    """A suffix of `length` tokens to the last user turn after which the answer is likely to begin with `target`.

    `width` replacements are tried at each of `steps`, each of one of the `top` tokens with the steepest gradient at a
    place. Runs under whatever is attached to the model, which must let gradients through. Only suffixes that are read
    as the same tokens again are tried, of printable ASCII. Raises `InputError` for a template that changes the text of
    a turn, or a target without tokens.
    """
    around = _around(lm, messages, target)
    allowed = _printable(lm)
    start = lm.tokenizer(_START * length, add_special_tokens=False).input_ids[:length]
    cache = _prefix(lm, around.before)
    generator = torch.Generator().manual_seed(seed)
    current = list(start)
    any_tried = False
    top = min(top, int(allowed.sum()))
    best = first = float(_losses(lm, around, cache, torch.tensor([current], device=lm.device))[0])
    for _ in range(steps):
        gradient = _gradient(lm, around, cache, current)
        gradient[:, ~allowed] = torch.inf
        tokens = (-gradient).topk(top, dim=-1).indices.cpu()
        tried = _candidates(lm, around, current, tokens, width, generator)
        if tried:
            any_tried = True
            losses = _losses(lm, around, cache, torch.tensor(tried, device=lm.device))
            place = int(losses.argmin())
            if float(losses[place]) < best:
                best, current = float(losses[place]), tried[place]
        advance(1)
    if not any_tried:
        raise InputError(
            f"the tokenizer of {lm.name} reads none of the suffixes that were tried as the same tokens again"
        )
    return Suffix(_text(lm, around, current)[1:], best, first)


def _around(lm: LanguageModel, messages: Sequence[Message], target: str) -> _Around:
    *earlier, last = messages
    whole = chat_text(lm, [*earlier, Message(last.role, f"{last.content} {_MARK}")])
    before, mark, after = whole.partition(f" {_MARK}")
    if not mark or _MARK in after:
        raise InputError(f"the chat template of {lm.name} changes the text of a turn, so no suffix can be placed in it")
    front, back, wanted = (text_ids(lm, text) for text in (before, after, target))
    if not wanted:
        raise InputError("the wanted beginning of the answer is empty; give at least a word")
    return _Around(front, back, wanted, (before, after))


def _embedding(lm: LanguageModel) -> nn.Embedding:
    found = lm.model.get_input_embeddings()
    assert isinstance(found, nn.Embedding)
    return found


def _printable(lm: LanguageModel) -> Tensor:
    """[vocab] bool: tokens of printable ASCII alone."""
    vocab = len(_embedding(lm).weight)
    special = set(lm.tokenizer.all_special_ids)
    texts = lm.tokenizer.batch_decode([[token] for token in range(min(vocab, len(lm.tokenizer)))])
    found = [i not in special and text.isascii() and text.isprintable() and text != "" for i, text in enumerate(texts)]
    return torch.tensor(found + [False] * (vocab - len(found)), device=lm.device)


def _prefix(lm: LanguageModel, before: Sequence[int]) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        lm.model(
            input_ids=torch.tensor([list(before)], device=lm.device),
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(lm.model): cache},
        )
    return cache


def _copy(cache: DynamicCache, times: int) -> DynamicCache:
    found = DynamicCache()
    for i, layer in enumerate(plain_layers(cache)):
        found.update(layer.keys.expand(times, -1, -1, -1), layer.values.expand(times, -1, -1, -1), i)
    return found


def _candidates(
    lm: LanguageModel, around: _Around, current: list[int], tokens: Tensor, width: int, generator: torch.Generator
) -> list[list[int]]:
    """Suffixes that differ from `current` in one token, and that the tokenizer reads as these very tokens."""
    places = torch.randint(len(current), (width,), generator=generator)
    ranks = torch.randint(tokens.shape[1], (width,), generator=generator)
    found = []
    for place, rank in zip(places.tolist(), ranks.tolist(), strict=True):
        one = list(current)
        one[place] = int(tokens[place, rank])
        found.append(one)
    texts = [_text(lm, around, one) for one in found]
    before, after = around.texts
    read = lm.tokenizer([f"{before}{text}{after}" for text in texts], add_special_tokens=False).input_ids
    return [
        one
        for one, text, ids in zip(found, texts, read, strict=True)
        if list(ids) == [*around.before, *one, *around.after] and text == f" {text.strip()}"
    ]


def _text(lm: LanguageModel, around: _Around, suffix: Sequence[int]) -> str:
    """The suffix with the space before it, which some tokenizers drop at the start of a text."""
    beside = around.before[-1:]
    return str(lm.tokenizer.decode([*beside, *suffix])).removeprefix(str(lm.tokenizer.decode(beside)))


def _losses(lm: LanguageModel, around: _Around, cache: DynamicCache, suffixes: Tensor) -> Tensor:
    """[n] nats per token of the target after each of `suffixes` [n, length]."""
    rest = torch.tensor([*around.after, *around.target], device=lm.device)
    found = []
    with torch.no_grad():
        for some in suffixes.split(_BATCH):
            ids = torch.cat([some, rest.expand(len(some), -1)], dim=1)
            found.append(_loss(lm, around, cache, input_ids=ids))
    return torch.cat(found)


def _gradient(lm: LanguageModel, around: _Around, cache: DynamicCache, suffix: Sequence[int]) -> Tensor:
    """[length, vocab] of the loss with respect to how much of each token stands at each place."""
    embedding = _embedding(lm)
    weight = embedding.weight.detach()
    ids = torch.tensor([list(suffix)], device=lm.device)
    rest = torch.tensor([[*around.after, *around.target]], device=lm.device)
    # some models scale what they look up
    scale = embedding(ids).detach().norm() / weight[ids].norm()
    one_hot = torch.nn.functional.one_hot(ids, len(weight)).to(weight.dtype).requires_grad_(True)
    embeds = torch.cat([(one_hot @ weight) * scale, embedding(rest).detach()], dim=1)
    with torch.enable_grad():
        loss = _loss(lm, around, cache, inputs_embeds=embeds).sum()
        (found,) = torch.autograd.grad(loss, one_hot)
    return found[0]


def _loss(lm: LanguageModel, around: _Around, cache: DynamicCache, **given: Tensor) -> Tensor:
    (tokens,) = given.values()
    n, target = len(tokens), torch.tensor(around.target, device=lm.device)
    past = len(around.before)
    logits = lm.model(
        **given,
        attention_mask=torch.ones(n, past + tokens.shape[1], dtype=torch.long, device=lm.device),
        use_cache=True,
        logits_to_keep=len(target) + 1,
        **{cache_argument(lm.model): _copy(cache, n)},
    ).logits[:, :-1]
    log_probs = logits.float().log_softmax(-1)
    said: Tensor = log_probs.gather(-1, target.expand(n, -1).unsqueeze(-1)).squeeze(-1)
    return -said.mean(-1)
