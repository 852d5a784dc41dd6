"""The side-by-side viewer of transcripts, one for every page: what `transcripts.html.jinja` and `.js` need."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from demur.report.escape import printable
from demur.types import Completion, Label, Prompt, Verdict

NO_WRAPPER = "none"

Answer = dict[str, Any]
"""Text, tokens and stop reason; label, judge and evidence; and in `others` what more judges said."""


class Spoken(NamedTuple):
    """What one side said."""

    key: str
    """Unique on the page."""
    name: str
    group: str
    """Heading over the side in the list of sides."""
    answers: dict[str, Answer]
    """By prompt id."""
    chosen: bool = False
    """Whether the viewer opens with it."""


class Transcripts(NamedTuple):
    """What the template shows and the script reads."""

    payload: dict[str, Any]
    """Sides, prompts and outputs, for the script."""
    facets: list[tuple[str, str]]
    """Name and title of each property of a prompt to choose by; those that tell nothing apart are left out."""
    judges: list[str]
    """The one whose labels count comes first."""
    system: str
    """The system turn that every conversation starts with; empty when they differ."""
    left_out: int
    """Completions whose prompt or spec the page does not know."""
    labels: tuple[Label, ...] = get_args(Label)


class Judged:
    """Verdicts by answer; those of one judge count, those of others stand beside them."""

    def __init__(self, verdicts: Sequence[Verdict], judge: str) -> None:
        self.judge = judge
        self.judges = list(dict.fromkeys([*([judge] if judge else []), *(verdict.judge for verdict in verdicts)]))
        """Who judged, `judge` first."""
        self._by_answer: dict[tuple[str, str], dict[str, Verdict]] = defaultdict(dict)
        for verdict in verdicts:
            self._by_answer[verdict.spec, verdict.prompt][verdict.judge] = verdict

    def answer(self, completion: Completion) -> Answer:
        """A completion with all that was said of it; unscored where the judge that counts said nothing."""
        said = self._by_answer.get((completion.spec, completion.prompt), {})
        missing = {"label": "unscored", "judge": self.judge, "evidence": "no verdict was recorded"}
        others = [_said(verdict) for judge, verdict in said.items() if judge != self.judge]
        return {
            "text": completion.text,
            "tokens": completion.tokens,
            "stop": completion.stop,
            **(_said(said[self.judge]) if self.judge in said else missing),
            **({"others": others} if others else {}),
        }


def _said(verdict: Verdict) -> dict[str, str]:
    said = {"label": verdict.label, "judge": verdict.judge, "evidence": verdict.evidence}
    return said | ({"harmful": verdict.harmful} if verdict.harmful else {})


def viewer(
    prompts: Sequence[Prompt],
    base: Spoken,
    others: Sequence[Spoken],
    sets: Mapping[str, str],
    set_of: Callable[[Prompt], str],
    facets: Mapping[str, str],
    judges: Sequence[str],
    left_out: int,
) -> Transcripts:
    """The answers of `base` beside those of one of `others`, for all prompts that somebody answered.

    `sets`: key and words of each set, and `set_of` the set of a prompt. `facets`: title by name, the names being
    `set`, `suite`, `category` and `wrapper`.
    """
    answered = {ident for side in (base, *others) for ident in side.answers}
    shown = [prompt for prompt in prompts if prompt.id in answered]
    system = _shared_system(shown)
    rows: list[dict[str, Any]] = []
    for prompt in shown:
        values = {
            "set": set_of(prompt),
            "suite": prompt.source,
            "category": prompt.category,
            "wrapper": prompt.wrapper or NO_WRAPPER,
        }
        kept = {name: values[name] for name in facets}
        words = [
            sets[value] if name == "set" else value
            for name, value in kept.items()
            if name != "wrapper" or prompt.wrapper
        ]
        rows.append(
            {
                "id": prompt.id,
                "harmful": prompt.intent == "harmful",
                "about": [
                    printable(text) for text in (prompt.id, *words, prompt.twin and f"twin of {prompt.twin}") if text
                ],
                "text": prompt.text,
                "earlier": [[turn.role, turn.content] for turn in prompt.messages[bool(system) : -1]],
                **kept,
            }
        )
    choices = {name: _choices(name, {row[name] for row in rows}, sets) for name in facets}
    choices = {name: some for name, some in choices.items() if len(some) > 1}
    payload = {
        "base": {"key": base.key, "name": base.name},
        "sides": [{"key": side.key, "name": side.name, "group": side.group, "chosen": side.chosen} for side in others],
        "facets": choices,
        "prompts": rows,
        "outputs": {side.key: side.answers for side in (base, *others)},
    }
    return Transcripts(payload, [(name, facets[name]) for name in choices], list(judges), system, left_out)


def _choices(name: str, values: set[str], sets: Mapping[str, str]) -> list[tuple[str, str]]:
    """Value and words of what can be chosen."""
    if name == "set":
        return [(key, text) for key, text in sets.items() if key in values]
    return [(value, printable(value)) for value in sorted(values) if value]


def _shared_system(prompts: Sequence[Prompt]) -> str:
    first = {turn.content if (turn := prompt.messages[0]).role == "system" else "" for prompt in prompts}
    return first.pop() if len(first) == 1 else ""
