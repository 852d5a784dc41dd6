"""Complete prompts under a spec, batch by batch, and keep every completion on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from demur.lm.batches import batches
from demur.lm.chat import chat_ids, with_system
from demur.lm.generate import generate
from demur.lm.load import LanguageModel
from demur.record import append_jsonl, read_jsonl
from demur.sae.topk import TopKSae
from demur.steering.steer import steer
from demur.types import Completion, Prompt, SteeringSpec


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

    def complete(
        self,
        lm: LanguageModel,
        prompts: Sequence[Prompt],
        spec: SteeringSpec,
        saes: dict[str, TopKSae],
        system: str,
        max_new_tokens: int,
        batch_size: int,
        advance: Callable[[float], None] = lambda amount: None,
    ) -> list[Completion]:
        """Complete all `prompts` after `system` under `spec`; `saes` maps SAE hashes to SAEs."""
        rows = [chat_ids(lm, with_system(prompt, system)) for prompt in prompts]
        label = spec.hash
        with steer(lm.model, spec, saes):
            for batch in batches([len(row) for row in rows], batch_size):
                if any((label, prompts[i].id) not in self._rows for i in batch):
                    answers = generate(lm, [rows[i] for i in batch], max_new_tokens)
                    made = [
                        Completion(prompts[i].id, label, answer.text, len(answer.ids), answer.stop)
                        for i, answer in zip(batch, answers, strict=True)
                    ]
                    append_jsonl(self._path, made)
                    self._rows.update({(row.spec, row.prompt): row for row in made})
                advance(len(batch))
        return self.of(label, prompts)
