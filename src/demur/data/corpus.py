"""Text to train and measure SAEs on: JSONL files of conversations or plain text, read document by document.

Only where each document begins is kept in memory (24 bytes), so that text of any size can be read in shuffled order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from demur.errors import InputError, NotFoundError
from demur.record import file_sha256, from_json
from demur.types import Message


class Document(NamedTuple):
    """One text."""

    messages: tuple[Message, ...]
    """A conversation; empty for plain text."""
    text: str
    """Plain text; empty for a conversation."""
    source: str
    """What the row or its file is called, with its licence where the row names one."""


class Corpus:
    """The documents of JSONL files whose rows have `messages` (a conversation) or `text`, in shuffled order."""

    def __init__(self, files: Sequence[Path], weights: Sequence[float] = (), seed: int = 0) -> None:
        """Look at every row of `files` once. `weights`: the share of each file in the text (by bytes), as ratios; the
        order ends where a file is used up, so that the mix holds throughout. Without them all documents are taken.

        Raises `NotFoundError` or `InputError` with the file and line.
        """
        if weights and (len(weights) != len(files) or not min(weights) > 0):
            raise InputError(
                f"weights are {', '.join(map(str, weights))}, expected one above 0 for each of {len(files)} text files"
            )
        self._files = tuple(files)
        self.hashes = {str(path): file_sha256(path) for path in files if path.is_file()}
        places = [_places(path) for path in files]
        starts = np.concatenate([[0], np.cumsum([len(p) for p in places])])
        self._table = np.concatenate(
            [np.column_stack([np.full(len(p), i), p]) for i, p in enumerate(places)] or [np.zeros((0, 3), np.int64)]
        )
        if not len(self._table):
            raise InputError("the text files hold no rows; give a JSONL file of conversations")
        random_order = np.random.default_rng(seed)
        shuffled = [starts[i] + random_order.permutation(len(p)) for i, p in enumerate(places)]
        self._order = (
            _mixed(shuffled, self._table[:, 2], weights) if weights else random_order.permutation(len(self._table))
        )

    def __len__(self) -> int:
        return len(self._order)

    def size(self, number: int) -> int:
        """Bytes of the row of document `number` of the order."""
        return int(self._table[self._order[number], 2])

    def __getitem__(self, number: int) -> Document:
        """Document `number` of the order, read from its file."""
        file, offset, size = (int(v) for v in self._table[self._order[number]])
        path = self._files[file]
        with path.open("rb") as stream:
            stream.seek(offset)
            raw = stream.read(size)
        row = _row(raw, f"{path} at byte {offset}")
        licence = f" ({row['licence']})" if row.get("licence") else ""
        source = f"{row.get('source', path.stem)}{licence}"
        if "messages" in row:
            return Document(tuple(from_json(list[Message], row["messages"], str(path))), "", source)
        return Document((), row["text"], source)

    def __iter__(self) -> Iterator[Document]:
        return (self[number] for number in range(len(self)))


def _places(path: Path) -> NDArray[np.int64]:
    """Offset and size in bytes of each row of `path` [rows, 2], each checked."""
    found: list[tuple[int, int]] = []
    offset = 0
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                text = line[3:] if number == 1 and line.startswith(b"\xef\xbb\xbf") else line
                if text.strip():
                    _check(_row(text, f"{path} line {number}"), f"{path} line {number}")
                    found.append((offset + len(line) - len(text), len(text)))
                offset += len(line)
    except FileNotFoundError:
        raise NotFoundError(f"text file {path} does not exist; give a JSONL file of conversations") from None
    except OSError as error:
        raise InputError(f"text file {path} cannot be read ({error.strerror})") from None
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise InputError(f"{place} is not UTF-8 text; give a JSONL file of conversations") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{place} is not JSON ({error}); give one JSON object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"{place} is not a JSON object with `messages` or `text`")
    return row


def _check(row: dict[str, Any], place: str) -> None:
    if "messages" in row:
        if not from_json(list[Message], row["messages"], place):
            raise InputError(f"{place}: `messages` is empty")
    elif not isinstance(row.get("text"), str):
        raise InputError(f"{place} has neither `messages` nor `text`")


def _mixed(shuffled: Sequence[NDArray[np.int64]], sizes: NDArray[np.int64], weights: Sequence[float]) -> Any:
    """Documents of all files, always from the file that is furthest behind its share of bytes, until one is used up."""
    taken = [0.0] * len(shuffled)
    place = [0] * len(shuffled)
    order: list[int] = []
    while True:
        file = min(range(len(shuffled)), key=lambda i: taken[i] / weights[i])
        if place[file] == len(shuffled[file]):
            return np.array(order, dtype=np.int64)
        document = int(shuffled[file][place[file]])
        place[file] += 1
        taken[file] += float(sizes[document])
        order.append(document)
