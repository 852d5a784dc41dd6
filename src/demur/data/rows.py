"""Rows of the files that people keep prompts in: CSV, TSV, JSONL, JSON, plain text, the same gzipped, and Parquet."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import zlib
from pathlib import Path
from typing import Any

from demur.errors import InputError, MissingExtraError, NotFoundError
from demur.record import json_lines
from demur.types import Message

Row = dict[str, Any]

_USUAL = ("text", "prompt", "instruction", "instructions", "goal", "Goal", "question", "forbidden_prompt", "Behavior")


def read_rows(path: Path) -> list[Row]:
    """Rows of a text file, at least one. A list of strings is a column called `text`, and so are the lines of a .txt.

    Raises `NotFoundError`, or `InputError` for a file that is unreadable, empty or of an unknown kind.
    """
    kind = Path(path.name.removesuffix(".gz")).suffix
    text = _text(path)
    rows: Any
    if kind in (".csv", ".tsv"):
        csv.field_size_limit(1 << 24)
        try:
            rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else ","))
        except csv.Error as error:
            raise InputError(f"prompt file {path} is not a {kind[1:].upper()} file ({error})") from None
    elif kind == ".json":
        try:
            rows = _listed(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"prompt file {path} is not JSON ({error})") from None
    elif kind == ".jsonl":
        rows = _array(text) or [row for _, row in json_lines(text, path)]
    elif kind == ".txt":
        rows = [{"text": line} for line in text.split("\n") if line.strip()]
    else:
        raise InputError(f"prompt file {path} is of an unknown kind; expected .csv, .tsv, .jsonl, .json or .txt")
    return _checked(rows, path)


def read_table(path: Path) -> list[Row]:
    """Rows of a Parquet file, or of any that `read_rows` reads. Raises `MissingExtraError` for one without pyarrow."""
    if path.suffix != ".parquet":
        return read_rows(path)
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MissingExtraError(
            f"{path.name} is a Parquet file, and reading one needs pyarrow; install it with pip install 'demur[eval]'"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except FileNotFoundError:
        raise NotFoundError(f"prompt file {path} does not exist; give a file or the name of a prompt set") from None
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise InputError(f"prompt file {path} is not a Parquet file ({str(error).splitlines()[0]})") from None
    return _checked(rows, path)


def only_column(path: Path, rows: list[Row]) -> str:
    """The column that holds the prompts, if its name is a usual one. Raises `InputError` with the names there are."""
    for usual in _USUAL:
        if usual in rows[0]:
            return usual
    raise InputError(f"{path} has the columns {', '.join(map(str, rows[0]))}; say which holds the prompts (`column`)")


def cell(row: Row, column: str, where: str) -> str:
    """The text in one cell, without the space around it. Raises `InputError` for anything but text, or for none."""
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise InputError(
            f"{where}: column {column!r} is {text!r}, expected text; the columns are {', '.join(map(str, row))}"
        )
    return text.strip()


def messages(row: Row, column: str, where: str) -> tuple[Message, ...]:
    """The prompt of a row: its text, after the turns of a column `before`, if it has one: a list of texts, of the user
    and the assistant in turn. Raises `InputError`."""
    last = Message("user", cell(row, column, where))
    before = row.get("before") or []
    if (
        not isinstance(before, list)
        or len(before) % 2
        or not all(isinstance(one, str) and one.strip() for one in before)
    ):
        raise InputError(
            f"{where}: column 'before' is {before!r}, expected the turns before the prompt: an even number of texts, "
            "of the user and the assistant in turn"
        )
    return (*(Message(("user", "assistant")[i % 2], one.strip()) for i, one in enumerate(before)), last)


def _text(path: Path) -> str:
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig") as file:
                return file.read()
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise NotFoundError(
            f"prompt file {path} does not exist; give a CSV, TSV, JSONL, JSON or TXT file, or the name of a prompt set"
        ) from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"prompt file {path} cannot be read as UTF-8 text ({error})") from None


def _listed(value: Any) -> Any:
    """The rows of a JSON file, which may be a list of strings or an object of columns ({"instructions": [...]})."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return [{"text": item} for item in value]
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        columns = {name: column for name, column in value.items() if column}
        if len({len(column) for column in columns.values()}) == 1:
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return value


def _array(text: str) -> list[Row] | None:
    """The rows of a .jsonl that is in truth one JSON array of objects, as HH-RLHF's red-team attempts are."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    return value if all(isinstance(item, dict) for item in value) else None


def _checked(rows: Any, path: Path) -> list[Row]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"prompt file {path} must be a list of objects, each with a column of prompt text")
    if not rows:
        raise InputError(f"prompt file {path} is empty; expected at least one prompt")
    return rows
