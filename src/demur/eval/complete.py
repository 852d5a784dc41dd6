"""Complete prompts under a spec, batch by batch, and keep every completion on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from demur.lm.batches import batches
from demur.lm.chat import chat_ids, with_system
from demur.lm.generate import generate
from demur.lm.load import LanguageModel
from demur.record import append_jsonl, read_jsonl
from demur.sae.base import Sae
from demur.sae.store import LoadedSae
from demur.spec import SteeringSpec, TextGate
from demur.steering.steer import steer
from demur.steering.vectors import Vector
from demur.text_gates import decide
from demur.types import Completion, Prompt


class Completions:
    """The completions of a run: `completions.jsonl`, one per (spec, prompt).

    A batch is generated whole or not at all, and the same prompts always form the same batches, so that a resumed
    run repeats exactly what an uninterrupted one does.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = {(row.spec, row.prompt): row for row in read_jsonl(Completion, path)}

    def of(self, spec: str, prompts: Sequence[Prompt]) -> list[Completion]:
        """Completions of `prompts` under the spec with this hash; KeyError for one that is missing."""
        return [self._rows[spec, prompt.id] for prompt in prompts]

    def all(self) -> list[Completion]:
        """Every completion so far."""
        return list(self._rows.values())

    def add(self, rows: Sequence[Completion]) -> None:
        """Keep completions that were made elsewhere, but for those that are here."""
        new = [row for row in rows if (row.spec, row.prompt) not in self._rows]
        append_jsonl(self._path, new)
        self._rows |= {(row.spec, row.prompt): row for row in new}

    def complete(
        self,
        lm: LanguageModel,
        prompts: Sequence[Prompt],
        spec: SteeringSpec | Sequence[SteeringSpec],
        saes: Mapping[str, Sae] | Sequence[LoadedSae],
        system: str,
        max_new_tokens: int,
        batch_size: int,
        advance: Callable[[float], None] = lambda amount: None,
        directions: Sequence[Vector] = (),
    ) -> list[Completion]:
        """Complete all `prompts` under `spec`, or each under its own.

        `saes` and `directions`: what the specs name by hash. A spec's system prompt stands in place of `system`. A text
        gate is decided for each prompt, and the completion counts as one of the gated spec. Raises as `decide`.
        """
        specs = [spec] * len(prompts) if isinstance(spec, SteeringSpec) else list(spec)
        talks = [with_system(prompt, one.system or system) for prompt, one in zip(prompts, specs, strict=True)]
        rows = [chat_ids(lm, talk) for talk in talks]
        mixed = not isinstance(spec, SteeringSpec) or isinstance(spec.gate, TextGate)
        keys = [(one.hash, prompt.id) for one, prompt in zip(specs, prompts, strict=True)]
        for batch in batches([len(row) for row in rows], batch_size):
            if any(keys[i] not in self._rows for i in batch):
                each: SteeringSpec | list[SteeringSpec] = specs[batch[0]]
                if mixed:
                    each = decide([specs[i] for i in batch], [talks[i] for i in batch], lm.device)
                with steer(lm, each, saes, directions=directions):
                    answers = generate(lm, [rows[i] for i in batch], max_new_tokens)
                made = [
                    Completion(prompts[i].id, keys[i][0], answer.text, len(answer.ids), answer.stop)
                    for i, answer in zip(batch, answers, strict=True)
                ]
                append_jsonl(self._path, made)
                self._rows.update({(row.spec, row.prompt): row for row in made})
            advance(len(batch))
        return [self._rows[key] for key in keys]
