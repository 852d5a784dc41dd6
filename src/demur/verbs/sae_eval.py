"""`demur sae eval`: how well an SAE reconstructs, how sparsely, and what the model loses by it, on text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from demur import progress
from demur.data.prompts import OWN, load_prompts
from demur.errors import InputError
from demur.eval.reconstruction import ce_recovered
from demur.lm.batches import batches, pad
from demur.lm.chat import with_system
from demur.lm.generate import generate
from demur.lm.harvest import MASSIVE
from demur.lm.hookpoints import device_at
from demur.lm.load import LanguageModel, load
from demur.lm.record import read
from demur.lm.token_types import TYPES, Typed, typed_chat
from demur.record import to_json
from demur.sae.metrics import Measured, Tokens, measure
from demur.sae.store import LoadedSae, check_fits, load_sae
from demur.types import SAFETY_SYSTEM_PROMPT, Hookpoint, parse_hookpoint
from demur.verbs.config import SaeEval
from demur.verbs.documents import some_rows

_ANSWER_TOKENS = 48
_PROMPTS = 32
"""Prompts of each of demur's own sets in the default text, under both system prompts."""
_CE_TEXTS = 64
OWN_TEXT = "demur's own prompts, answered by the model under both system prompts"


def sae_eval(config: SaeEval) -> dict[str, Any]:
    """Measure the SAE. Returns `metrics` (fvu, l0, dead, ce_recovered, kl, fvu by type of token, ...) and on what.

    `dead` is the share of latents active on none of the tokens looked at: on little text it overstates death.
    Raises as `load_sae`, `load` and `check_fits` do.
    """
    loaded, lm, hookpoint = with_its_model(config.sae, config.model, config.device)
    if config.data:
        rows = some_rows(lm, config.data, config.context, config.max_tokens, config.seed)
        text = ", ".join(path.name for path in config.data)
    else:
        rows, text = own_text(lm, _PROMPTS), OWN_TEXT
    sieve = Sieve()
    measured = measure(loaded.sae, residuals(lm, hookpoint, rows, sieve))
    recovered = ce_recovered(lm, loaded.sae, hookpoint, [row.ids for row in rows[:_CE_TEXTS]])
    numbers = {
        **measured.metrics._asdict(),
        "tokens_left_out": sieve.left_out,
        **{key: value for key, value in recovered._asdict().items() if key != "tokens"},
        **_by_type_and_rate(measured),
    }
    return {
        "sae": loaded.path,
        "hash": loaded.hash,
        "model": lm.name,
        "weights": lm.origin,
        "hookpoint": str(hookpoint),
        "text": text,
        "metrics": numbers,
        "card": to_json(loaded.config)["metrics"],
    }


def _by_type_and_rate(measured: Measured) -> dict[str, Any]:
    types = {
        TYPES[kind]: {"fvu": fvu, "tokens": measured.tokens_by_type[kind]} for kind, fvu in measured.fvu_by_type.items()
    }
    rates = measured.rates
    by_rate = {"edges": [*rates.edges], "counts": [*rates.counts], "never": rates.never}
    return {"fvu_by_type": types, "latents_by_rate": by_rate}


def with_its_model(sae: str | Path, model: str, device: str) -> tuple[LoadedSae, LanguageModel, Hookpoint]:
    """The SAE, `model` or else the one it was trained on, and its hookpoint; the SAE is where that block runs."""
    loaded = load_sae(sae)
    lm = load(model_for(loaded, model), device=device)
    hookpoint = parse_hookpoint(loaded.config.hookpoint)
    place = device_at(lm.model, hookpoint)
    check_fits(loaded, lm.name, lm.fingerprint, lm.d_model, lm.n_blocks)
    loaded.sae.to(place)
    return loaded, lm, hookpoint


def model_for(loaded: LoadedSae, given: str) -> str:
    """The model to load: the one `given`, else the one that the SAE was trained on. `InputError` without either."""
    from demur.lm import embedded

    if not given and not loaded.config.model.name:
        raise InputError(f"the files of the SAE {loaded.path!r} do not say which model it reads; give --model")
    name = given or loaded.config.model.name
    return embedded.NAME if name == embedded.HUB_ID and not given else name


def own_text(lm: LanguageModel, prompts: int) -> list[Typed]:
    """Test prompts of demur's own sets, `prompts` of each or a few more, under both system prompts, with the model's
    answers: text that everyone has and no SAE was trained on."""
    chosen = [p for name in OWN for p in load_prompts(name, "benign") if p.split == "test"]
    chosen = chosen[:: max(1, len(chosen) // (prompts * len(OWN)))]
    systems = ("", SAFETY_SYSTEM_PROMPT)
    asked = [typed_chat(lm, with_system(p, system), generation=True) for p in chosen for system in systems]
    assistant = TYPES.index("assistant")
    rows: list[Typed] = []
    with progress.track("answers", len(asked), "prompts") as advance:
        for batch in batches([len(row.ids) for row in asked], 32):
            answers = generate(lm, [asked[i].ids for i in batch], _ANSWER_TOKENS)
            for i, answer in zip(batch, answers, strict=True):
                types = [*asked[i].types, *[assistant] * len(answer.ids)]
                rows.append(Typed([*asked[i].ids, *answer.ids], types))
            advance(len(batch))
    return rows


class Sieve:
    """Leaves out massive tokens, which no SAE is trained on; the first batch says which norms are massive."""

    def __init__(self) -> None:
        self.seen = self.kept = 0
        self._limit: float | None = None

    @property
    def left_out(self) -> float:
        """Share of tokens left out."""
        return 1 - self.kept / max(self.seen, 1)

    def __call__(self, tokens: Tokens) -> Tokens:
        """The ordinary ones of `tokens`."""
        norms = tokens.x.norm(dim=-1)
        self._limit = MASSIVE * float(norms.median()) if self._limit is None else self._limit
        ordinary = norms <= self._limit
        self.seen += len(norms)
        self.kept += int(ordinary.sum())
        return Tokens(tokens.x[ordinary], None if tokens.types is None else tokens.types[ordinary.cpu()])


def residuals(lm: LanguageModel, hookpoint: Hookpoint, rows: Sequence[Typed], sieve: Sieve) -> Iterator[Tokens]:
    """Residuals [n, d_model] of `rows`, float32, with their types, massive tokens left out."""
    with progress.track("residuals", len(rows), "texts") as advance:
        for batch in batches([len(row.ids) for row in rows], 8):
            padded = pad(lm, [rows[i].ids for i in batch], side="right")
            residual = read(lm.model, hookpoint, padded.ids, padded.mask).residual[padded.mask.bool()].float()
            yield sieve(Tokens(residual, types_of([rows[i] for i in batch])))
            advance(len(batch))


def types_of(rows: Sequence[Typed]) -> torch.Tensor:
    """Types [tokens] of `rows` one after the other, uint8."""
    return torch.tensor([kind for row in rows for kind in row.types], dtype=torch.uint8)
