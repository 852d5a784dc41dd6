"""What a prompt suite is: files, whose they are, and which of their columns mean what. Data, no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from demur.types import Intent, Split


@dataclass(frozen=True)
class Part:
    """One file of a suite."""

    files: tuple[str, ...]
    """Names it goes by, the published one first: looked for in the data folder and in the folders in it."""
    hub_file: str = ""
    """Its path in the suite's dataset on the hub; empty if it is not there."""
    intent: Intent | None = None
    """Of every row; without it the suite's labels say."""
    split: Split = "test"
    """`select` for a part that is published for training or validation."""
    tag: str = ""
    """Stands before the published ids, where several parts count from the same number."""
    twin: str = ""
    """Tag of the part whose prompt with the same published id each of these borrows its words from."""


@dataclass(frozen=True)
class Suite:
    """A prompt set that others publish, or one of demur's own (which has no parts)."""

    name: str
    """What `--suite` calls it, and what its prompts' ids begin with."""
    title: str
    licence: str
    """Of the prompts."""
    paper: str = ""
    """arXiv id."""
    homepage: str = ""
    parts: tuple[Part, ...] = ()
    hub: str = ""
    """Id of a dataset on the hub."""
    gated: bool = False
    """Whether the hub gives it only to those who accepted its terms."""
    text: tuple[str, ...] = ("prompt",)
    """Columns that may hold the request; the first that is there does."""
    context: str = ""
    """Column of a text that the request is about; it goes before the request."""
    first_turn: bool = False
    """The text is a transcript (`Human: ... Assistant: ...`): only its first human turn is asked."""
    label: str = ""
    """Column that says what a row is."""
    labels: Mapping[str, Intent] = field(default_factory=dict)
    """What its values mean. Rows with any other value are neither harmful nor benign, and left out."""
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Values of columns that a row must have to be in."""
    identity: str = ""
    """Column of the published id; without it, ids are hashes of the text."""
    category: tuple[str, ...] = ()
    """Columns that make the category, joined by a slash; a column of yes and no gives its own name for yes."""
    harmful: int | None = None
    """Prompts of this intent, as counted in the published files; None where we could not count."""
    benign: int | None = None
    note: str = ""
    """What a reader of its rates must know."""

    @property
    def intents(self) -> tuple[Intent, ...]:
        """What its prompts are: harmful, benign or both."""
        found = {part.intent for part in self.parts} | set(self.labels.values())
        if not self.parts:
            found = {"benign" if self.harmful is None else "harmful"}
        intents: tuple[Intent, ...] = ("harmful", "benign")
        return tuple(intent for intent in intents if intent in found)
