"""Show what `demur why` returned, as `show` does for the other verbs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from demur.cli.show import show_json
from demur.record import to_json
from demur.results import Diagnosis

if TYPE_CHECKING:
    from rich.table import Table


def show_why(result: Diagnosis, as_json: bool) -> None:
    """The diagnosis in sentences, a row for each side, what to know, and where the page is."""
    from rich.console import Console

    from demur.report.escape import printable
    from demur.report.table import fitting, new_grid, plain_text
    from demur.report.why import headline, summary

    console = Console(stderr=True)

    def layout(lines: int) -> Table:
        grid = new_grid(lines)
        grid.add_column("side", overflow="fold")
        for name in ("KL, nats per token", "refusing, log-odds", "plain refused"):
            grid.add_column(name)
        for row in summary([result.unsteered, *result.sides]):
            grid.add_row(*map(plain_text, row))
        return grid

    console.print(fitting(layout, None))
    for line in headline(result):
        console.print(printable(line), highlight=False, markup=False)
    for note in result.notes:
        console.print(f"Note: {printable(note)}", highlight=False, markup=False)
    print(f"report: {result.report}", file=sys.stderr)
    if as_json:
        show_json(to_json(result))
