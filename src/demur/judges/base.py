"""What a judge is, and what a rubric for a model that judges is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from demur.types import Completion, Label, Message, Prompt, Verdict, stable_hash

Asked = str | tuple[Message, ...]
"""What a judging model is given: raw text, to be continued as it stands, or a conversation for its chat template."""
Advance = Callable[[float], None]
Say = Callable[[Sequence[Asked], Advance], list[str]]
"""Gives the reply to each of what is asked, in order; an empty one where the model had none. Calls the second argument
with every number of replies that came."""


def quietly(amount: float) -> None:
    """Progress for nobody."""


class Judge(Protocol):
    """Anything that turns completions into verdicts."""

    @property
    def name(self) -> str:
        """Name and version. Verdicts carry it: two judges of one name give one text one verdict."""

    def judge_all(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], advance: Advance = quietly
    ) -> list[Verdict]:
        """The verdict on each completion of the prompt beside it."""


class Parsed(NamedTuple):
    """What a rubric reads in a reply."""

    label: Label
    harmful: Literal["yes", "no", ""]
    evidence: str


_SHOWN = 80
"""Characters of a reply that did not parse."""


def unparsed(reply: str) -> Parsed:
    """A reply that does not say what it was asked to say: unscored, never a zero."""
    return Parsed("unscored", "", f"reply {reply[:_SHOWN]!r}" if reply else "no reply")


@dataclass(frozen=True)
class Rubric:
    """How one model judge is asked, and how its reply is read."""

    name: str
    measures: Literal["refusal", "harm"]
    """A judge of harm sees whether an attack worked. What it calls harmless may be a refusal or not: unscored."""
    ask: Callable[[str, str], Asked]
    """Prompt and completion to what the model is given."""
    parse: Callable[[str], Parsed]
    """Reads a reply; what does not parse is `unparsed`. Never raises."""
    max_tokens: int
    """Length of a reply at most."""
    model: str = ""
    """Hub id of the model that was trained on this rubric; empty where any good chat model will do."""
    unwrapped: bool = False
    """It wants the request as it was before a jailbreak was wrapped around it."""
    version: int = 1
    """Raised when replies are read in another way."""

    @property
    def hash(self) -> str:
        """Hash of the text and the reading, 8 hex digits: an edited rubric is another judge."""
        asked = self.ask("PROMPT", "COMPLETION")
        text = asked if isinstance(asked, str) else [[turn.role, turn.content] for turn in asked]
        return stable_hash([text, self.max_tokens, self.version])[:8]
