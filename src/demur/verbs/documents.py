"""Chat text files to token ids, for training and measuring SAEs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from demur import progress
from demur.errors import InputError, NotFoundError
from demur.lm.chat import chat_ids, text_ids
from demur.lm.load import LanguageModel
from demur.record import from_json, json_lines
from demur.types import Message


class Documents(NamedTuple):
    """Texts as a model reads them."""

    rows: list[list[int]]
    """Token ids, one document each, in shuffled order."""
    sources: dict[str, int]
    """Documents by source, with its licence where the rows name one."""


def documents(lm: LanguageModel, files: Sequence[Path], context: int, max_tokens: int, seed: int) -> Documents:
    """Read JSONL files whose rows have `messages` (formatted with the chat template) or `text`.

    Shuffles with `seed`, keeps `context` tokens of each document and stops at `max_tokens`. Raises `NotFoundError`
    or `InputError` with the file and line.
    """
    rows: list[dict[str, Any]] = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise NotFoundError(f"text file {path} does not exist; give a JSONL file of conversations") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"text file {path} cannot be read as UTF-8 text ({error})") from None
        for number, row in json_lines(text, path):
            if not isinstance(row, dict) or not ("messages" in row or isinstance(row.get("text"), str)):
                raise InputError(f"{path} line {number} has neither `messages` nor `text`")
            if "messages" in row:
                row["messages"] = from_json(list[Message], row["messages"], f"{path} line {number}")
                if not row["messages"]:
                    raise InputError(f"{path} line {number}: `messages` is empty")
            rows.append({"source": path.stem, **row})
    if not rows:
        raise InputError("the text files hold no rows; give a JSONL file of conversations")
    random.Random(seed).shuffle(rows)
    kept: list[list[int]] = []
    sources: Counter[str] = Counter()
    total = 0
    with progress.track("tokenise", len(rows), "documents") as advance:
        for row in rows:
            advance(1)
            if "messages" in row:
                ids = chat_ids(lm, row["messages"], generation=False)[:context]
            else:
                ids = text_ids(lm, row["text"], special=True)[:context]
            if len(ids) < 2:
                continue
            if total + len(ids) > max_tokens:
                break
            kept.append(ids)
            licence = f" ({row['licence']})" if row.get("licence") else ""
            sources[f"{row['source']}{licence}"] += 1
            total += len(ids)
    return Documents(kept, dict(sorted(sources.items())))
