"""Suites and files become prompts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from demur.data.prompts import OWN, TRAINING, hashed_split, load_prompts
from demur.data.rows import Row, cell, messages, only_column, read_table
from demur.data.suites.find import fetch
from demur.data.suites.published import SUITES
from demur.data.suites.suite import Part, Suite
from demur.errors import InputError, NotFoundError
from demur.record import file_sha256
from demur.types import Intent, Message, Prompt, Split, stable_hash

_WORDS: dict[str, Intent] = {
    **dict.fromkeys(("harmful", "unsafe", "toxic"), "harmful"),
    **dict.fromkeys(("benign", "safe", "unharmful", "harmless"), "benign"),
}
_SPLITS: dict[str, Split] = {
    **dict.fromkeys(("", "test", "eval"), "test"),
    **dict.fromkeys(("select", "val", "validation", "dev", "train"), "select"),
}


class Loaded(NamedTuple):
    """The prompts of a suite, and what became of the rows that are none."""

    prompts: list[Prompt]
    rows: int
    """In the files."""
    left_out: int
    """Rows that are neither harmful nor benign, or of a kind the suite leaves out (its `labels` and `only`)."""
    duplicates: int
    """Rows whose text an earlier one has; they are dropped, also where the label differs."""
    files: dict[str, str]
    """SHA-256 of every file that was read, by path; none for demur's own sets."""


def suites() -> tuple[Suite, ...]:
    """All suites that are known, demur's own first."""
    return SUITES


def find_suite(name: str) -> Suite | None:
    """The suite of this name, or None. `_` is `-`, and case does not matter."""
    plain = name.lower().replace("_", "-")
    return next((suite for suite in SUITES if suite.name == plain), None)


def load_suite(
    name_or_path: str,
    data_dir: Path | None = None,
    intent: Intent | None = None,
    column: str = "",
    otherwise: Intent | None = None,
) -> list[Prompt]:
    """The prompts of a suite by name, or of any CSV, TSV, JSONL, JSON, TXT (also .gz) or Parquet file.

    A suite's files are looked for in `data_dir` (a file, a folder, or a folder of folders), then on the hub. With
    `intent`, only prompts of that intent; for a file that does not say (in a column `intent`, `label` or
    `prompt_harm_label`) it is the intent of all, as is `otherwise`, which chooses nothing. `column` names the prompt
    text where it is not the usual one.

    Ids are `suite/id` with the published id, else with a hash of the text, so that the order of a file does not
    matter (demur's own sets keep theirs). A text that occurs twice is kept once, the first time; `read_suite` counts
    the rest. Prompts are `test` unless published for validation or training; those of a file without a column `split`
    are split as `load_prompts` does. Raises `NotFoundError`, `DownloadError`, `InputError` or `MissingExtraError`
    (Parquet), each with what to do.
    """
    return read_suite(name_or_path, data_dir, intent, column, otherwise).prompts


def read_suite(
    name_or_path: str,
    data_dir: Path | None = None,
    intent: Intent | None = None,
    column: str = "",
    otherwise: Intent | None = None,
) -> Loaded:
    """As `load_suite`, with the counts of rows that became no prompts and the hashes of the files."""
    suite = find_suite(name_or_path)
    if suite is None:
        return _chosen(_file(Path(name_or_path).expanduser(), intent or otherwise, column), intent, name_or_path)
    if suite.name in OWN + TRAINING:
        prompts = load_prompts(suite.name, suite.intents[0])
        return _chosen(Loaded(prompts, len(prompts), 0, 0, {}), intent, suite.name)
    found: list[Prompt] = []
    files: dict[str, str] = {}
    counted = left_out = 0
    for part in suite.parts:
        path = fetch(suite, part, data_dir)
        rows = read_table(path)
        prompts = list(_prompts(suite, part, rows, path, column))
        if not prompts:
            raise InputError(f"{path} has {len(rows)} rows but none for {suite.name}; check that it is {suite.title}")
        files[str(path)] = file_sha256(path)
        counted += len(rows)
        left_out += len(rows) - len(prompts)
        found += prompts
    kept = _unique(found, suite.title)
    return _chosen(Loaded(kept, counted, left_out, len(found) - len(kept), files), intent, suite.name)


def _prompts(suite: Suite, part: Part, rows: list[Row], path: Path, column: str) -> Iterator[Prompt]:
    column = column or _present(rows[0], suite.text, path, suite)
    needed = [*suite.only, *([suite.label] if suite.label and not part.intent else []), suite.context, suite.identity]
    for name in filter(None, needed):
        _present(rows[0], (name,), path, suite)
    for number, row in enumerate(rows, start=1):
        intent = part.intent or suite.labels.get(str(row.get(suite.label)))
        if intent is None or any(str(row.get(name)) not in values for name, values in suite.only.items()):
            continue
        text = cell(row, column, f"{path} row {number}")
        if suite.first_turn:
            text = _first_turn(text)
        if not text:
            continue
        if suite.context and str(row.get(suite.context) or "").strip():
            text = f"{str(row[suite.context]).strip()}\n\n---\n\n{text}"  # as HarmBench's DirectRequest joins them
        published = "" if not suite.identity or row.get(suite.identity) is None else str(row[suite.identity])
        tag = f"{part.tag}-" if part.tag else ""
        yield Prompt(
            id=f"{suite.name}/{tag}{published or stable_hash(text)}",
            messages=(Message("user", text),),
            intent=intent,
            source=suite.name,
            category="/".join(_words(row, suite.category)),
            split=part.split,
            twin=f"{suite.name}/{part.twin}-{published}" if part.twin and published else "",
        )


def _file(path: Path, intent: Intent | None, column: str) -> Loaded:
    if not path.exists():
        close = difflib.get_close_matches(str(path), [suite.name for suite in SUITES], n=1)
        raise NotFoundError(
            f"{str(path)!r} is neither a prompt suite nor a file here"
            f"{f'; did you mean {close[0]}?' if close else ''}; `demur suites` lists the suites, "
            "and any CSV, JSONL, JSON or TXT file will do"
        )
    rows = read_table(path)
    column = column or only_column(path, rows)
    said = _said(rows)
    if said is None and intent is None:
        raise InputError(
            f"{path} does not say what its prompts are; give the intent, harmful or benign, or a column `intent`"
        )
    stem = path.name.split(".")[0]
    split_said = any("split" in row for row in rows)
    prompts = []
    for number, row in enumerate(rows, start=1):
        where = f"{path} row {number}"
        turns = messages(row, column, where)
        text, talk = turns[-1].content, "\n".join(turn.content for turn in turns)
        split = str(row.get("split") or "")
        if split not in _SPLITS:
            raise InputError(f"{where}: split is {split!r}, expected test, or select, validation or train")
        prompts.append(
            Prompt(
                id=f"{stem}/{row.get('id') or stable_hash(talk)}",
                messages=turns,
                intent=said[number - 1] if said is not None else intent or "harmful",
                source=path.name,
                category="/".join(_words(row, ("category",)) or _words(row, ("type",))),
                split=_SPLITS[split] if split_said else hashed_split(text),
                twin=str(row.get("twin") or ""),
                wrapper=str(row.get("wrapper") or ""),
                unwrapped=str(row.get("unwrapped") or ""),
            )
        )
    kept = _unique(prompts, str(path))
    return Loaded(kept, len(rows), 0, len(prompts) - len(kept), {str(path): file_sha256(path)})


def _chosen(loaded: Loaded, intent: Intent | None, name: str) -> Loaded:
    if intent is None:
        return loaded
    if intent not in ("harmful", "benign"):
        raise InputError(f"intent is {intent!r}, expected harmful or benign")
    kept = [prompt for prompt in loaded.prompts if prompt.intent == intent]
    if not kept:
        raise InputError(f"{name} has no {intent} prompts, only {loaded.prompts[0].intent} ones; leave the intent out")
    return loaded._replace(prompts=kept)


def _unique(prompts: list[Prompt], where: str) -> list[Prompt]:
    texts: set[tuple[Message, ...]] = set()
    kept: dict[str, Prompt] = {}
    for prompt in prompts:
        if prompt.messages in texts:
            continue
        if prompt.id in kept:
            raise InputError(f"{where}: id {prompt.id!r} belongs to two prompts; ids must be unique")
        texts.add(prompt.messages)
        kept[prompt.id] = prompt
    return list(kept.values())


def _said(rows: list[Row]) -> list[Intent] | None:
    """The intent of every row by the first column that gives it for all; None without such a column."""
    for name in ("intent", "label", "prompt_harm_label"):
        found = [_WORDS.get(str(row.get(name)).lower()) for row in rows]
        known = [intent for intent in found if intent is not None]
        if len(known) == len(rows):
            return known
    return None


def _present(row: Row, columns: tuple[str, ...], path: Path, suite: Suite) -> str:
    for name in columns:
        if name in row:
            return name
    raise InputError(
        f"{path} has the columns {', '.join(map(str, row))}, expected {' or '.join(columns)}; check that it is "
        f"{suite.title}, or name the column of the prompts (`column`)"
    )


def _words(row: Row, columns: tuple[str, ...]) -> list[str]:
    found = []
    for name in columns:
        value = row.get(name)
        if value is True or value == "True":
            found.append(name)
        elif isinstance(value, list):
            found.append(", ".join(map(str, value)))
        elif value not in (None, "", "False", False):
            found.append(str(value))
    return found


def _first_turn(transcript: str) -> str:
    """The first thing the person says; empty if nobody does."""
    match = re.match(r"Human:(.*?)(?=\n\n(?:Assistant|Human):|\Z)", transcript, flags=re.DOTALL)
    return match[1].strip() if match else ""
