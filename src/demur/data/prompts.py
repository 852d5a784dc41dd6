"""Load prompt sets: demur's own by name, or any CSV, JSONL or JSON file with a named column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_args

from demur.data.rows import messages, only_column, read_rows
from demur.errors import InputError
from demur.types import Intent, Prompt, Question, Split, stable_hash

T = TypeVar("T")
_FOLDER = Path(__file__).parent / "prompts"
OWN = ("harmful", "lookalike", "plain")
"""Names of demur's own prompt sets."""
TRAINING = ("twins-harmful", "twins-lookalike", "talks-harmful", "talks-lookalike", "everyday")
"""Names of its larger sets, which gates are trained on; only talks have a test split."""


def load_prompts(name: str, intent: Intent, column: str = "") -> list[Prompt]:
    """Prompts from one of demur's own sets (`harmful`, `lookalike`, `plain`, those of `TRAINING`) or from a file.

    `column` names the prompt text in a CSV, JSONL or JSON list; `before` (turns before it, of the user and the
    assistant), `split`, `category`, `id` and `twin` are read where they exist. A file without splits is split by a hash
    of each text, 30 % select and 70 % test, so that a prompt never changes sides. Raises
    `NotFoundError` or `InputError` with the row that is wrong.
    """
    own = name in OWN + TRAINING
    path = _FOLDER / f"{name}.jsonl" if own else Path(name).expanduser()
    rows = read_rows(path)
    column = column or ("text" if own else only_column(path, rows))
    source = f"demur/{name}" if own else path.name
    prompts = []
    for number, row in enumerate(rows, start=1):
        said = messages(row, column, f"{path} row {number}")
        prompts.append(
            Prompt(
                id=str(row.get("id") or f"{path.stem}-{number:04d}"),
                messages=said,
                intent=intent,
                source=source,
                category=str(row.get("category") or ""),
                split=_split(row.get("split"), said[-1].content, f"{path} row {number}"),
                twin=str(row.get("twin") or ""),
            )
        )
    _check_unique([prompt.id for prompt in prompts], path)
    return prompts


def load_questions(name: str = "mc") -> list[Question]:
    """Multiple-choice questions: demur's own (`mc`) or a JSONL file with question, choices and answer (0-based)."""
    path = _FOLDER / "mc.jsonl" if name == "mc" else Path(name).expanduser()
    questions = []
    for number, row in enumerate(read_rows(path), start=1):
        choices, answer = row.get("choices"), row.get("answer")
        if not (isinstance(row.get("question"), str) and isinstance(choices, list) and len(choices) > 1):
            raise InputError(f"{path} row {number} needs `question` (text) and `choices` (a list of at least two)")
        if not (isinstance(answer, int) and 0 <= answer < len(choices)):
            raise InputError(f"{path} row {number}: answer is {answer!r}, expected 0 to {len(choices) - 1}")
        questions.append(
            Question(
                id=str(row.get("id") or f"{path.stem}-{number:04d}"),
                question=row["question"],
                choices=tuple(str(choice) for choice in choices),
                answer=answer,
                category=str(row.get("category") or ""),
                split=_split(row.get("split"), row["question"], f"{path} row {number}"),
            )
        )
    _check_unique([question.id for question in questions], path)
    return questions


def take(items: Sequence[Any], split: Split, limit: int = 0) -> list[Any]:
    """Items of one split; at most `limit`, spread evenly over the set so that no category is favoured."""
    return spread([item for item in items if item.split == split], limit)


def spread(items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` of `items`, evenly over all of them; 0 for all."""
    if not limit or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def prompts_hash(items: Sequence[Prompt | Question]) -> str:
    """Hash of a prompt set: of everything in it, in order."""
    return stable_hash([asdict(item) for item in items])


def _split(given: Any, text: str, where: str) -> Split:
    if given in get_args(Split):
        split: Split = given
        return split
    if given not in (None, ""):
        raise InputError(f"{where}: split is {given!r}, expected select or test")
    return hashed_split(text)


def hashed_split(text: str) -> Split:
    """30 % select and 70 % test, by a hash of the text, so that a prompt never changes sides."""
    return "select" if int(stable_hash(text.strip()), 16) % 10 < 3 else "test"


def _check_unique(ids: list[str], path: Path) -> None:
    seen: set[str] = set()
    for item in ids:
        if item in seen:
            raise InputError(f"{path}: id {item!r} occurs twice; ids must be unique")
        seen.add(item)
