"""Show what the verbs of `demur judge` returned: tables for people on stderr, one JSON object on stdout if asked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, get_args

from demur.cli.show import show_json
from demur.record import to_json
from demur.types import Label

if TYPE_CHECKING:
    from rich.console import Console

    from demur.verbs.judge import Judged
    from demur.verbs.judge_validate import Validation


def show_validation(found: Validation, as_json: bool) -> None:
    """Pooled figures and those of each group, people's labels against the judge's, and where disagreements are."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{escape(found.judge)} against people: {found.measures}")
    for name in ("", "kappa", "accuracy", "sensitivity", "specificity"):
        table.add_column(name, justify="right" if name else "left")
    for name, one in {**(found.groups if len(found.groups) > 1 else {}), "all": found}.items():
        table.add_row(
            escape(name),
            _estimate(one.kappa, one.kappa_low, one.kappa_high, one.n),
            _estimate(one.accuracy, one.accuracy_low, one.accuracy_high, one.n),
            _estimate(one.sensitivity, one.sensitivity_low, one.sensitivity_high, one.tp + one.fn),
            _estimate(one.specificity, one.specificity_low, one.specificity_high, one.tn + one.fp),
        )
    classes = Table(title="people's label (rows) and the judge's")
    classes.add_column("")
    for name in next(iter(found.classes.values())):
        classes.add_column(name, justify="right")
    for name, counts in found.classes.items():
        classes.add_row(name, *map(str, counts.values()))
    console = _console()
    console.print(table)
    console.print(classes)
    where = f", listed in {found.disagreements_file}" if found.disagreements_file else ""
    console.print(
        f"they differ on {found.disagreements} of {found.n} answers{where}; unscored by the judge {found.unscored}, "
        f"without people's label {found.unlabelled}; 95 % intervals",
        highlight=False,
        markup=False,
    )
    if as_json:
        show_json(to_json(found))


def show_judged(found: Judged, as_json: bool) -> None:
    """Labels by suite and spec, and the agreement with the other judges of the run."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"answers by label, judged by {escape(found.judge)}")
    # a column for each label that occurs, and for what is said of harm
    labels = [label for label in get_args(Label) if any(row.labels[label] for row in found.suites)]
    harm = any(row.harmful or row.harmless for row in found.suites)
    for name in ("suite", "spec"):
        table.add_column(name)
    for name in (*labels, *(["harmful"] if harm else [])):
        table.add_column(name, justify="right")
    for row in found.suites:
        suite = f"{row.suite} {row.intent}{f' @{row.wrapper}' if row.wrapper else ''}"
        said = [f"{row.harmful} of {row.harmful + row.harmless}"] if harm else []
        table.add_row(escape(suite), escape(row.side), *(str(row.labels[label]) for label in labels), *said)
    console = _console()
    console.print(table)
    for judge, one in found.agreement.items():
        console.print(
            f"agreement with {judge} on {found.measures}: kappa {one.kappa:.3f} ({one.kappa_low:.3f} to "
            f"{one.kappa_high:.3f}) over {one.n} answers that both scored",
            highlight=False,
            markup=False,
        )
    console.print(f"{found.judged} answers judged now, in {found.run}", highlight=False, markup=False)
    if as_json:
        show_json(to_json(found))


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _estimate(value: float, low: float, high: float, n: int) -> str:
    """The estimate with its denominator, and its interval in a second line."""
    return f"- of {n}" if math.isnan(value) else f"{value:.3f} of {n}\n{low:.3f}–{high:.3f}"
