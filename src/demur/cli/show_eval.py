"""Show what the verbs that evaluate returned, as `show` does for the others."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from demur.cli.show import show_json
from demur.record import to_json
from demur.results import Evaluation

if TYPE_CHECKING:
    from demur.verbs.compare import Compared
    from demur.verbs.reproduce import Reproduced


def show_evaluation(result: Evaluation, as_json: bool) -> None:
    """Rates, capability and damage of every side, and what was not taken whole."""
    from rich.console import Console

    from demur.report.compare_table import evaluation_table

    Console(stderr=True).print(evaluation_table(result))
    print(f"report: {result.report}", file=sys.stderr)
    if as_json:
        show_json(to_json(result))


def show_compared(compared: Compared, form: str, as_json: bool) -> None:
    """The table, a verdict line for each contrast, and where the page is; Markdown and LaTeX go to stdout."""
    from rich.console import Console

    from demur.report.compare_table import as_latex, as_markdown, as_table, lines

    console = Console(stderr=True)
    if form == "table":
        console.print(as_table(compared.comparisons))
        for line in lines(compared.comparisons):
            console.print(line, highlight=False, markup=False)
    elif form == "markdown" and not as_json:
        print(as_markdown(compared.comparisons))
        print("".join(f"\n- {note}" for note in compared.notes))
    elif not as_json:
        print(as_latex(compared.comparisons))
        print("".join(f"% {note}\n" for note in compared.notes))
    for note in compared.notes:
        console.print(f"Note: {note}", highlight=False, markup=False)
    print(f"page: {compared.report}", file=sys.stderr)
    if as_json:
        show_json(
            {
                "comparisons": to_json(compared.comparisons),
                "notes": compared.notes,
                "report": compared.report,
            }
        )


def show_reproduced(found: Reproduced, as_json: bool) -> None:
    """What differs, gravest first, and how many answers came out the same."""
    order = ("numbers", "rounding", "nothing")
    for one in sorted(found.differences, key=lambda one: order.index(one.severity)):
        print(f"  differs ({one.severity}): {one.what}: {one.then} then, {one.now} now", file=sys.stderr)
    print(
        f"{found.same_answers} of {found.answers} answers are the same to the letter; {found.same_labels} were judged "
        f"alike; {found.same_scores} of {found.scores} task scores are equal\nrun: {found.folder}",
        file=sys.stderr,
    )
    if as_json:
        show_json({**to_json(found), "differences": [one._asdict() for one in found.differences]})


def show_suites(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Name, prompts, licence and place of each suite."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for heading in ("suite", "what", "licence", "where"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row["name"], row["title"], row["licence"], row["where"])
    Console(stderr=True).print(table)
    if as_json:
        show_json({"suites": rows})
