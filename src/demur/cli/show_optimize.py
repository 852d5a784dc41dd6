"""Show what `demur optimize` returned, as `show` does for the others."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from demur.cli.show import show_json
from demur.record import to_json
from demur.results import Optimized

if TYPE_CHECKING:
    from demur.verbs.optimize import Picked


def show_optimized(found: Optimized, as_json: bool) -> None:
    """The front as a table, what the search did, what to know, and where the page is."""
    from rich.console import Console

    from demur.report.optimize import front_table, summary

    console = Console(stderr=True)
    console.print(front_table(found))
    for line in (summary(found), *(f"Note: {note}" for note in found.notes)):
        console.print(line, highlight=False, markup=False)
    print(f"page: {found.report}", file=sys.stderr)
    if as_json:
        show_json(to_json(found))


def show_picked(picked: Picked, as_json: bool) -> None:
    """What was written, and what measures it on prompts that it was not chosen by."""
    print(f"trial {picked.tried.number}: {picked.tried.label}", file=sys.stderr)
    print(f"spec: {picked.path}\non prompts that it was not chosen by: {picked.command}", file=sys.stderr)
    if as_json:
        show_json({"path": picked.path, "trial": to_json(picked.tried), "command": picked.command})
