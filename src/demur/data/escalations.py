"""Scripted escalations: conversations that begin harmlessly and end by asking for the objective.

Written for demur: eight objectives, no operational detail in any turn. A file of your own in the same form is read too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from demur.errors import InputError
from demur.record import from_json, read_json

OWN = Path(__file__).parent / "attacks" / "escalations.json"
FORMAT = "demur-escalations/1"


@dataclass(frozen=True)
class Escalation:
    """One objective and the way to it."""

    id: str
    objective: str
    """What the attacker is after, as an order to the model."""
    category: str = ""
    turns: tuple[tuple[str, ...], ...] = ()
    """For each turn wordings that mean the same; the last turn asks for the objective itself."""
    about: tuple[str, ...] = ()
    """Words, or how they begin, that an answer which serves the objective is likely to have; lower case."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    def __post_init__(self) -> None:
        if not self.id or not self.objective.strip():
            raise InputError("an escalation needs an id and an objective")
        if any(not turn or not all(wording.strip() for wording in turn) for turn in self.turns):
            raise InputError(f"a turn of the escalation {self.id} is empty; give each at least one wording")


def load_escalations(path: Path | None = None, names: Iterable[str] = ()) -> list[Escalation]:
    """demur's own escalations, or those of a file; of either those called `names`, in that order, if any are.

    Raises `NotFoundError`, or `InputError` for what is no such file, an id that occurs twice or a name that does not.
    """
    raw = read_json(path or OWN)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or not isinstance(raw.get("escalations"), list):
        raise InputError(f"{path} is no file of escalations; expected an object with the format {FORMAT!r}")
    found = {}
    for number, one in enumerate(raw["escalations"], 1):
        escalation = from_json(Escalation, one, f"{path or OWN.name} escalation {number}")
        if escalation.id in found:
            raise InputError(f"the escalation {escalation.id!r} occurs twice; give each an id of its own")
        found[escalation.id] = escalation
    if wrong := [name for name in names if name not in found]:
        raise InputError(f"there is no escalation {wrong[0]!r}; there are {', '.join(found)}")
    return [found[name] for name in names] or list(found.values())
