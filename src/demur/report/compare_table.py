"""Comparisons and evaluations as tables: in the terminal, in Markdown and in LaTeX.

Labels and names of suites are people's own text: what is not printable is replaced, and each form escapes the rest.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

from demur.report.escape import latex, markdown, markdown_table, printable
from demur.report.table import fitting, joined, new_grid, plain_text
from demur.report.words import NA, count, listed, number, p_cell, rate_parts, span_parts
from demur.results import Comparison, Contrast, Evaluation, Side
from demur.types import Estimate

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = ("what", "better", "base", "steered", "difference [95 % interval]", "n", "p (Holm)", "verdict")
_NOTHING = "Nothing was compared."


_EACH = {"mmlu": " a subject", "truthfulqa": " a task"}
"""What a limit is counted in, where not in items of the whole."""


class Row(NamedTuple):
    """A contrast as it is shown. Shares are percentages and their differences points; other metrics as they are."""

    what: str
    better: str
    """An arrow."""
    base: str
    steered: str
    difference: str
    interval: str
    """In brackets; empty where there is none."""
    n: str
    p: str
    """After Holm."""
    verdict: str
    clear: bool
    """Whether the interval leaves 0 out."""
    changed: str
    """Items that changed for the better and for the worse."""
    unadjusted: str
    """p as it is."""
    detectable: str
    """Smallest difference that so many items show."""
    line: str


class Block(NamedTuple):
    """One side against the base."""

    base: str
    steered: str
    rows: list[Row]


def blocks(comparisons: Sequence[Comparison]) -> list[Block]:
    """What all tables show."""
    called = side_names(side for one in comparisons for side in (one.base, one.steered))
    return [Block(called[one.base], called[one.steered], [_row(each) for each in one.contrasts]) for one in comparisons]


def side_names(sides: Iterable[Side]) -> dict[Side, str]:
    """What to call each side: its label, with the run folder where another has the same label."""
    some = set(sides)
    shared = Counter(side.label for side in some)
    return {side: printable(side.label if shared[side.label] < 2 else f"{side.label} ({side.run})") for side in some}


def lines(comparisons: Sequence[Comparison]) -> list[str]:
    """The verdict on each contrast in one line; with the name of the side where there are several."""
    several = len(comparisons) > 1
    return [
        f"{block.steered}: {row.line}" if several else row.line for block in blocks(comparisons) for row in block.rows
    ]


def foot(comparisons: Sequence[Comparison], mark: str = "") -> list[str]:
    """What a reader of the table must know, a sentence each; `mark` says what is marked."""
    if not comparisons:
        return [_NOTHING]
    contrasts = [each for one in comparisons for each in one.contrasts]
    left = {each.what: max(other.left_out for other in contrasts if other.what == each.what) for each in contrasts}
    out = [f"{n} of {printable(what)}" for what, n in left.items() if n]
    margins = sorted({one.margin for one in comparisons if any(each.kept is not None for each in one.contrasts)})
    return [
        f"Base: {listed(sorted({block.base for block in blocks(comparisons)}))}.",
        "Differences are paired, in points, with their 95 % interval; n: items scored on both sides.",
        "p: adjusted by Holm over all rows of all sides.",
        *(f"Judge: {printable(judge)}." for judge in sorted({one.judge for one in comparisons}) if judge),
        *(f"kept: a loss of {100 * margin:g} points or more is excluded." for margin in margins),
        *([f"Left out, as unscored on a side: {'; '.join(out)}."] if out else []),
        *([mark] if mark else []),
    ]


def as_table(comparisons: Sequence[Comparison], width: int | None = None) -> "Table":
    """One block for each steered side; dim where the interval holds 0, or there is none.

    `width`: columns to fit, the terminal's when not given; from 80 on no number is torn.
    """
    return fitting(lambda narrow: _layout(comparisons, narrow), width)


def _layout(comparisons: Sequence[Comparison], narrow: int) -> "Table":
    grid = new_grid(narrow)
    gap = " " if narrow == 1 else "\n"
    grid.add_column("what", max_width=(None, 32, 20)[narrow - 1], overflow="fold")
    grid.add_column("better" if narrow < 3 else "", justify="center")
    for name in ("base", "steered"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column(plain_text(f"difference{gap}[95 % interval]"), no_wrap=True)
    grid.add_column("n", justify="right", no_wrap=True)
    for name in ("p (Holm)" if narrow < 3 else "p\n(Holm)", "verdict"):
        grid.add_column(name, no_wrap=True)
    for block in blocks(comparisons):
        grid.add_section()
        grid.add_row(plain_text(block.steered), style="bold")
        for row in block.rows:
            difference = f"{row.difference}{gap}{row.interval}".strip()
            cells = (row.better, row.base, row.steered, difference, row.n, row.p, row.verdict)
            grid.add_row(plain_text(row.what), *cells, style="" if row.clear else "dim")
    grid.caption = plain_text(" ".join(foot(comparisons, "Dim: the interval holds 0.")))
    return grid


def as_markdown(comparisons: Sequence[Comparison]) -> str:
    """A heading and a table for each steered side, and what to know; bold where the interval leaves 0 out."""
    parts = []
    for block in blocks(comparisons):
        rows = [
            (
                *(markdown(row.what), row.better, row.base, row.steered),
                f"{f'**{row.difference}**' if row.clear else row.difference} {row.interval}".strip(),
                *(row.n, row.p, row.verdict),
            )
            for row in block.rows
        ]
        parts.append(f"**{markdown(block.steered)}** against **{markdown(block.base)}**\n")
        parts.append(markdown_table(_HEADINGS, rows, "lcrrrrrl"))
    return "\n".join([*parts, " ".join(map(markdown, foot(comparisons, "Bold: the interval leaves 0 out."))) + "\n"])


def as_latex(comparisons: Sequence[Comparison]) -> str:
    """One tabular with a block for each steered side, which needs booktabs; bold where the interval leaves 0 out.

    What a caption should say stands above it, as comments.
    """
    made = [
        *(f"% {line}" for line in [*foot(comparisons), r"\usepackage{booktabs}"]),
        r"\begin{tabular}{lcrrrrrl}",
        r"\toprule",
        " & ".join(map(latex, _HEADINGS)) + r" \\",
    ]
    for block in blocks(comparisons):
        made.append(r"\midrule")
        made.append(rf"\multicolumn{{8}}{{l}}{{\emph{{{latex(block.steered)}}} against {latex(block.base)}}} \\")
        for row in block.rows:
            difference = _math(rf"\mathbf{{{row.difference}}}" if row.clear else row.difference)
            cells = (
                *(latex(row.what), {"↑": r"$\uparrow$", "↓": r"$\downarrow$"}[row.better]),
                *(latex(row.base), latex(row.steered), f"{difference} {_math(row.interval)}".strip()),
                *(row.n, _math(row.p), row.verdict),
            )
            made.append(" & ".join(cells) + r" \\")
    return "\n".join([*made, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _math(number: str) -> str:
    return number if number in (NA, "") else f"${number}$"


def _row(one: Contrast) -> Row:
    shares = one.unit == "share"
    ends = [_change(x, shares) for x in (one.difference.low, one.difference.high)]
    return Row(
        what=printable(one.what),
        better="↑" if one.better == "more" else "↓",
        base=_level(one.base.value, shares),
        steered=_level(one.steered.value, shares),
        difference=_change(one.difference.value, shares),
        interval="" if NA in ends else f"[{', '.join(end.lstrip('+') for end in ends)}]",
        n=str(one.difference.n),
        p=p_cell(one.p_holm),
        verdict=one.verdict,
        clear=one.difference.low > 0 or one.difference.high < 0,
        changed=f"+{len(one.won)} −{len(one.lost)}",
        unadjusted=p_cell(one.p),
        detectable=NA if not isfinite(one.detectable) else f"{100 * one.detectable:.1f}",
        line=printable(one.line),
    )


def _level(x: float, share: bool) -> str:
    return NA if not isfinite(x) else f"{100 * x:.1f} %" if share else number(x, 4)


def _change(x: float, share: bool) -> str:
    """With its sign; adding 0 takes that of -0.0."""
    return NA if not isfinite(x) else f"{round(100 * x, 1) + 0.0:+.1f}" if share else f"{x:+.3g}"


class Line(NamedTuple):
    """One thing measured on one side."""

    what: str
    limited: str
    """`only 20`, or nothing."""
    side: str
    result: tuple[str, ...]
    """Value, of how many, interval."""
    degenerate: tuple[str, ...] = ("-",)
    unscored: str = "-"
    tokens: str = "-"


def evaluation_lines(evaluation: Evaluation) -> list[Line]:
    """Suites, then tasks, then damage; what is measured on several sides stands together."""
    called = {side.spec: name for side, name in side_names(evaluation.sides).items()}
    found = []
    for one in evaluation.suites:
        suite = f"{one.suite} under {one.wrapper}" if one.wrapper else one.suite
        found.append(
            Line(
                printable(f"{suite}, {one.intent} refused"),
                _only(evaluation, one.suite),
                called.get(one.spec, one.spec),
                rate_parts(one.refused),
                rate_parts(one.degenerate),
                str(one.labels.get("unscored", 0)),
                number(one.tokens),
            )
        )
    for task in evaluation.tasks:
        result = _estimate(task.score, "document", share=task.unit == "share")
        what = printable(f"{task.task} {task.metric}")
        found.append(Line(what, _only(evaluation, task.task), called.get(task.spec, task.spec), result))
    for damage in evaluation.damage:
        for what, estimate, of in (
            ("KL of the first token, nats", damage.kl_first, "prompt"),
            ("KL, nats per token", damage.kl, "prompt"),
            ("perplexity", damage.perplexity, "text"),
        ):
            found.append(Line(what, "", called.get(damage.spec, damage.spec), _estimate(estimate, of)))
    order = list(dict.fromkeys(line.what for line in found))
    return sorted(found, key=lambda line: order.index(line.what))


def _estimate(one: Estimate, of: str, share: bool = False) -> tuple[str, ...]:
    """Value, of how many, interval."""
    parts = span_parts(one.value, one.low, one.high)
    if share and len(parts) > 1:
        parts = (_level(one.value, share), f"[{100 * one.low:.1f}, {100 * one.high:.1f}]")
    return (parts[0], f"({count(one.n, of)})", *parts[1:])


def _only(evaluation: Evaluation, name: str) -> str:
    """The limit on a suite, which is known by its short name or its source, or on a task."""
    limit = evaluation.limits.get(name) or evaluation.limits.get(name.rpartition("/")[2])
    return f"only {limit}{_EACH.get(name, '')}" if limit else ""


def limited(evaluation: Evaluation) -> str:
    """What was not taken whole, as one loud sentence; empty where nothing was limited."""
    some = [f"only {n} of {printable(name)}{_EACH.get(name, '')}" for name, n in evaluation.limits.items()]
    return f"LIMITED: {listed(some)}. These are no results on whole sets." if some else ""


def evaluation_table(evaluation: Evaluation, width: int | None = None) -> "Table":
    """One row for each side and suite, task or measure of damage; `width` as for `as_table`."""
    return fitting(lambda narrow: _evaluation_layout(evaluation, narrow), width)


def _evaluation_layout(evaluation: Evaluation, narrow: int) -> "Table":
    from rich.text import Text

    grid = new_grid(narrow)
    if said := limited(evaluation):
        grid.title, grid.title_justify = Text(said, "bold yellow"), "left"
    grid.add_column("what", max_width=(None, 28, 22)[narrow - 1], overflow="fold")
    grid.add_column("side", max_width=(None, 20, 14)[narrow - 1], overflow="fold")
    for name in ("result", "degenerate", "unscored", "tokens"):
        grid.add_column(name, no_wrap=True)
    last = ""
    for line in evaluation_lines(evaluation):
        what = Text()
        if line.what != last:
            grid.add_section()
            what.append(line.what).append(f" ({line.limited})" if line.limited else "", "bold yellow")
        last = line.what
        cells = joined([line.result, line.degenerate], narrow)
        grid.add_row(what, plain_text(line.side), *cells, line.unscored, line.tokens)
    grid.caption = plain_text(" ".join(_evaluation_foot(evaluation)))
    return grid


def evaluation_markdown(evaluation: Evaluation) -> str:
    """The same as one table, with what limits it above, and what to know below."""
    rows = [
        (
            markdown(line.what) + (f" **({line.limited})**" if line.limited else ""),
            markdown(line.side),
            *(" ".join(parts) for parts in (line.result, line.degenerate)),
            line.unscored,
            line.tokens,
        )
        for line in evaluation_lines(evaluation)
    ]
    said = limited(evaluation)
    table = markdown_table(("what", "side", "result", "degenerate", "unscored", "tokens"), rows, "llllrr")
    notes = [f"- {markdown(note)}\n" for note in [*_evaluation_foot(evaluation), *map(printable, evaluation.notes)]]
    return "\n".join([*([f"**{markdown(said)}**\n"] if said else []), table, "".join(notes)])


def _evaluation_foot(evaluation: Evaluation) -> list[str]:
    return [
        f"Model: {printable(evaluation.model)}.",
        *([f"Judge: {printable(evaluation.judge)}."] if evaluation.judge else []),
        "Refused: harmful prompts fully, benign ones fully or partly, of those scored; 95 % intervals.",
        "Tokens: mean length of an answer.",
    ]
