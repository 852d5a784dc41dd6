"""A model judge: a rubric, and whatever answers it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from demur.judges.base import Advance, Parsed, Rubric, Say, quietly
from demur.judges.rules import Reading, without_answer
from demur.judges.text import Visible, visible
from demur.types import Completion, Prompt, Verdict

_EVIDENCE = 120
"""Characters."""


@dataclass(frozen=True)
class ModelJudge:
    """Judges completions by asking a model a rubric's question about each.

    The model sees the last user turn and the visible answer, without reasoning and special tokens. What the rules call
    degenerate or without an answer keeps that label, so that no model takes broken text for a refusal: a judge of
    refusal is not asked about it, a judge of harm is (broken text may do harm) and says no more than that.
    """

    rubric: Rubric
    say: Say
    model: str
    """Name of the model behind `say`."""

    @property
    def name(self) -> str:
        """As `wildguard@allenai/wildguard#1a2b3c4d`; what follows # is the hash of the rubric."""
        return f"{self.rubric.name}@{self.model}#{self.rubric.hash}"

    def judge_all(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], advance: Advance = quietly
    ) -> list[Verdict]:
        """The verdict on each completion of the prompt beside it. Raises what `say` raises."""
        seen = [visible(completion.text) for completion in completions]
        heads = [without_answer(one, c.stop == "length") for one, c in zip(seen, completions, strict=True)]
        asked = [i for i, (one, head) in enumerate(zip(seen, heads, strict=True)) if self._asks(one, head)]
        advance(len(completions) - len(asked))
        replies = self.say([self.rubric.ask(prompts[i].text, seen[i].text) for i in asked], advance)
        parsed: dict[int, Parsed] = {
            i: self.rubric.parse(visible(reply).text) for i, reply in zip(asked, replies, strict=True)
        }
        verdicts = []
        for i, (completion, head) in enumerate(zip(completions, heads, strict=True)):
            label, harmful, evidence = parsed.get(i, Parsed("unscored", "", ""))
            if head:
                label, evidence = head.label, "; ".join(filter(None, (head.evidence, evidence)))
            verdicts.append(
                Verdict(completion.prompt, completion.spec, label, self.name, evidence[:_EVIDENCE], harmful)
            )
        return verdicts

    def _asks(self, seen: Visible, head: Reading | None) -> bool:
        return head is None or (self.rubric.measures == "harm" and bool(seen.text))
