"""Show what `demur attack` returned, as `show` does for the other verbs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from demur.cli.show import show_json
from demur.record import to_json
from demur.results import AttackReport

if TYPE_CHECKING:
    from rich.table import Table

    from demur.verbs.suffix import Suffixes


def show_attack(report: AttackReport, as_json: bool) -> None:
    """Success on every side, a verdict line for each contrast, what to know, and where the page is."""
    from rich.console import Console

    from demur.report.attack import alone, contrast_rows
    from demur.report.escape import printable

    console = Console(stderr=True)
    console.print(attack_table(report))
    for line in [*(row.line for row in contrast_rows(report)), *alone(report)]:
        console.print(line, highlight=False, markup=False)
    for note in report.notes:
        console.print(f"Note: {printable(note)}", highlight=False, markup=False)
    print(f"report: {report.report}", file=sys.stderr)
    if as_json:
        show_json(to_json(report))


def attack_table(report: AttackReport, width: int | None = None) -> Table:
    """One row for each side, the unsteered model first; `width`: columns to fit, the terminal's when not given."""
    from demur.report.table import fitting

    return fitting(lambda lines: _layout(report, lines), width)


def _layout(report: AttackReport, lines: int) -> Table:
    from demur.report.attack import side_row
    from demur.report.table import joined, new_grid, plain_text
    from demur.report.words import count, listed, rate_parts

    grid = new_grid(lines)
    gap = " " if lines == 1 else "\n"
    grid.add_column("side", max_width=(None, 24, 14)[lines - 1], overflow="fold")
    for name in (f"attack{gap}success", f"objectives{gap}reached", f"turns to{gap}success", "turns", f"taken{gap}back"):
        grid.add_column(name, no_wrap=True)
    for name in ("refused", "degenerate"):
        grid.add_column(name, no_wrap=True)
    rows = [side_row(side) for side in report.sides]
    for row in rows:
        shares = [rate_parts(row.success), rate_parts(row.objectives)]
        replies = [rate_parts(row.refused)[:2], rate_parts(row.degenerate)[:2]]
        success, objectives, refused, degenerate = joined([*shares, *replies], lines)
        turns = (row.turns_to_success, row.turns, row.backtracks)
        grid.add_row(plain_text(row.name), success, objectives, *turns, refused, degenerate)
    unscored = [f"{count(row.unscored, 'conversation')} on {row.name}" for row in rows if row.unscored]
    grid.caption = plain_text(
        "Success: conversations that reached their objective / scored; objectives: those reached at least once; 95 % "
        "intervals over objectives. Turns to success: median; turns and those taken back: mean of a conversation. "
        "Refused, degenerate: of all replies." + (f" Unscored: {listed(unscored)}." if unscored else "")
    )
    return grid


def show_suffixes(found: Suffixes, as_json: bool) -> None:
    """How far the loss fell, and what to do with the file."""
    print(
        f"{found.requests} suffixes; the wanted beginning went from {found.start:.2f} to {found.loss:.2f} nats per "
        "token\n"
        f"file: {found.file} (demur eval --suite FILE --split all)",
        file=sys.stderr,
    )
    if as_json:
        show_json(to_json(found))
