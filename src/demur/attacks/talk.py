"""A conversation between an attacker and a target, as it is kept on disk turn by turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from demur.results import End
from demur.results import Turn as Turn
from demur.types import Message


class Key(NamedTuple):
    """Which conversation."""

    objective: str
    seed: int
    spec: str
    """Hash of the target's spec."""


class Talk:
    """A conversation so far."""

    def __init__(self, key: Key, turns: Iterable[Turn] = ()) -> None:
        self.key = key
        self.turns = list(turns)
        """In order, those that were taken back too."""
        self.end: End | None = None
        """Why it goes on no more, though it has not succeeded and might have more turns."""

    @property
    def kept(self) -> list[Turn]:
        """Turns that the target still sees."""
        return [turn for turn in self.turns if not turn.taken_back]

    @property
    def backtracks(self) -> int:
        """Turns that were taken back."""
        return len(self.turns) - len(self.kept)

    @property
    def success(self) -> bool:
        """The objective was reached."""
        return any(turn.success for turn in self.turns)

    def messages(self, user: str) -> tuple[Message, ...]:
        """The conversation with another question at its end."""
        found: list[Message] = []
        for turn in self.kept:
            found += [Message("user", turn.user), Message("assistant", turn.reply)]
        return (*found, Message("user", user))


def talks(keys: Sequence[Key], turns: Iterable[Turn], ends: Iterable[End] = ()) -> list[Talk]:
    """The conversations called `keys`, as far as `turns` and `ends` go."""
    found = {key: Talk(key) for key in keys}
    for turn in turns:
        if talk := found.get(Key(turn.objective, turn.seed, turn.spec)):
            talk.turns.append(turn)
    for end in ends:
        if talk := found.get(Key(end.objective, end.seed, end.spec)):
            talk.end = end
    return [found[key] for key in keys]
