"""A study in the terminal: one table and one sentence."""

from typing import TYPE_CHECKING, NamedTuple

from demur.report.words import number, p_text, rate_parts, rate_short, signed, span_parts
from demur.types import UNSTEERED, Rate, StudyResult, StudyRow

if TYPE_CHECKING:
    from rich.table import Table


class Pair(NamedTuple):
    """The two rows that the headline compares."""

    before: StudyRow
    """The unsteered model."""
    after: StudyRow
    """The steered model at `best_value`."""


def headline(result: StudyResult) -> Pair | None:
    """Unsteered row and best row; None while either has not been measured."""
    before = next((row for row in result.rows if row.spec == UNSTEERED), None)
    steered = [row for row in result.rows if row.spec != UNSTEERED]
    after = next((row for row in steered if row.value == result.best_value), None)
    return Pair(before, after) if before and after else None


def verdict_line(result: StudyResult) -> str:
    """The outcome as one sentence with its numbers, the costs beside the gain.

    The comparison of harmful prompts carries the paired interval and p; when the interval holds 0 it says
    that no clear change was found. The other changes are given as measured, without a test.
    """
    pair = headline(result)
    if pair is None:
        return f"Latent {result.latent}: no steered value was compared with the unsteered model."
    before, after = pair
    low, high = result.best_gain_low, result.best_gain_high
    if low > 0:
        lead = "raised harmful prompts refused from"
    elif high < 0:
        lead = "lowered harmful prompts refused from"
    else:
        lead = "made no clear change to harmful prompts refused: from"
    change = f"{rate_short(before.harmful_refused)} to {rate_short(after.harmful_refused)}"
    gain = f"{signed(result.best_gain)} points [{_bound(low)}, {_bound(high)}], {p_text(result.best_gain_p)}"
    costs = [
        _change("plain benign prompts refused", before.benign_refused, after.benign_refused),
        _change("look-alikes refused", before.lookalike_refused, after.lookalike_refused),
        _change("degenerate completions", before.degenerate, after.degenerate),
        _change("capability", before.capability, after.capability),
        "KL " + " ".join(span_parts(after.kl, after.kl_low, after.kl_high)) + " nats per token",
    ]
    clamp = f"Clamping latent {result.latent} at {number(after.value)}"
    return f"{clamp} {lead} {change}, {gain}; {'; '.join(costs)}."


def table(result: StudyResult, width: int | None = None) -> "Table":
    """Every row of a study as a rich table, steered rows first.

    `width`: columns to fit, the terminal's when not given. From about 150 on a row takes one line, from 100
    two, from 80 three; a cell breaks between its parts, never inside one.
    """
    from rich import get_console
    from rich.measure import Measurement

    console = get_console()
    if width is None:
        width = console.width
    options = console.options.update(max_width=1000)
    layouts = (_layout(result, lines) for lines in (1, 2, 3))
    fits = (grid for grid in layouts if Measurement.get(console, options, grid).maximum <= width)
    return next(fits, None) or _layout(result, 3)


def _layout(result: StudyResult, lines: int) -> "Table":
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, caption_justify="left")
    grid.padding = (0, 1 if lines < 3 else 0, 0, 0)
    for name in ("latent", "value"):
        grid.add_column(name, justify="right")
    gap = " " if lines == 1 else "\n"
    for name in ("harmful", "benign", "look-alikes" if lines < 3 else "look-\nalikes"):
        grid.add_column(f"{name}{gap}refused")
    for name in ("degenerate", "capability", "KL"):
        grid.add_column(name)
    for row in result.rows:
        start = row.spec == UNSTEERED
        names = ("none", "-") if start else (str(result.latent), number(row.value))
        best = not start and row.value == result.best_value
        grid.add_row(*names, *_cells(row, lines), style="bold" if best else "")
    grid.add_section()
    for row in result.control_rows:
        grid.add_row(str(result.control_latent), number(row.value), *_cells(row, lines), style="dim")
    unscored = sum(row.unscored for row in (*result.rows, *result.control_rows))
    grid.caption = "k/n and 95 % interval. Bold: most harmful prompts refused. Dim: control latent." + (
        f" {unscored} completions could not be scored and are in no denominator." if unscored else ""
    )
    return grid


def _cells(row: StudyRow, lines: int) -> list[str]:
    rates = (row.harmful_refused, row.benign_refused, row.lookalike_refused, row.degenerate, row.capability)
    cells = [*map(rate_parts, rates), span_parts(row.kl, row.kl_low, row.kl_high)]
    if lines == 1:
        return [" ".join(parts) for parts in cells]
    if lines == 3:
        return ["\n".join(parts) for parts in cells]
    return [" ".join(parts[:-1]) + "\n" + parts[-1] if len(parts) > 1 else parts[0] for parts in cells]


def _change(what: str, before: Rate, after: Rate) -> str:
    if not before.n or not after.n:
        return f"{what} {rate_short(before)} before and {rate_short(after)} after"
    if before.value == after.value:
        return f"{what} stayed at {rate_short(after)}"
    verb = "rose" if after.value > before.value else "fell"
    return f"{what} {verb} from {rate_short(before)} to {rate_short(after)}"


def _bound(x: float) -> str:
    return signed(x).lstrip("+")
