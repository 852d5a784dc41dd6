"""A study, a discovery and rankings in the terminal: tables, and a sentence each."""

from collections.abc import Callable, Sequence
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

from demur.report.words import (
    NA,
    count,
    estimate_text,
    listed,
    number,
    p_text,
    rate_parts,
    rate_short,
    rate_text,
    share,
    signed,
    span_parts,
)
from demur.types import UNSTEERED, Discovery, Effect, Estimate, LatentRanking, LatentScore, Rate, StudyResult, StudyRow

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


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
    return fitting(lambda lines: _layout(result, lines), width)


def discovery_line(discovery: Discovery) -> str:
    """Which latent was chosen, by whom it was proposed, and what it does on the select split, as one sentence."""
    methods = listed(discovery.proposed_by) or "no method"
    of = f" ({len(discovery.proposed_by)} of {count(len(discovery.places), 'method')})" if discovery.places else ""
    lead = (
        f"Latent {discovery.winner} at {number(discovery.value)}, proposed by {methods}{of}, won of "
        f"{count(discovery.proposed, 'proposed latent')}"
    )
    if not discovery.finalists:
        return f"{lead}; no answer under it was judged."
    best = discovery.finalists[0]
    refused = [
        f"{rate_text(rate)} of {kind} prompts"
        for rate, kind in ((best.harmful_refused, "harmful"), (best.benign_refused, "plain"))
        if rate
    ]
    return (
        f"{lead}: on the select split, which is no test, the model then refuses {listed(refused) or NA}, the log-odds "
        f"of refusing change by {estimate_text(best.harmful)} on harmful and {estimate_text(best.benign)} on plain "
        f"prompts, and KL is {estimate_text(best.kl)} nats per token."
    )


def discovery_table(discovery: Discovery, width: int | None = None) -> "Table":
    """Finalists, controls and sets as a rich table, the winner first; `width` as for `table`.

    A terminal of 80 columns shows no efficiency, which is the change on harmful prompts over KL. Log-odds have two
    decimals here, the page more where they are small.
    """
    return fitting(lambda lines: _discovery_layout(discovery, lines), width, most=4)


def ranking_table(rankings: Sequence[LatentRanking], top: int, width: int | None = None) -> "Table":
    """The first `top` latents of each ranking side by side, each with its score; `width` as for `table`."""

    def layout(lines: int) -> "Table":
        grid = new_grid(lines)
        grid.add_column("place", justify="right")
        for one in rankings:
            grid.add_column(plain_text(f"{one.method}\n{number(len(one.scores))} ranked"), no_wrap=True)
        for place in range(min(top, max((len(one.scores) for one in rankings), default=0))):
            cells = (one.scores[place] if place < len(one.scores) else None for one in rankings)
            grid.add_row(str(place + 1), *(_score(item, "  " if lines == 1 else "\n") for item in cells))
        grid.caption = "Latent and score, best first. Scores of different methods have different units."
        return grid

    return fitting(layout, width)


def _score(item: LatentScore | None, gap: str) -> str:
    return f"{item.latent}{gap}{number(item.score, 4)}" if item else ""


def _discovery_layout(discovery: Discovery, lines: int) -> "Table":
    grid = new_grid(lines)
    gap = " " if lines == 1 else "\n"
    grid.add_column("select split", max_width=12 if lines > 2 else None)
    for name in (f"harmful{gap}refused", f"plain{gap}refused", f"harmful{gap}log-odds", f"plain{gap}log-odds", "KL"):
        grid.add_column(name, no_wrap=True)
    if lines < 4:
        grid.add_column(f"log-odds{gap}per nat", no_wrap=True)
    grid.add_column("wins", no_wrap=True)
    for effects, style in (
        (discovery.finalists, ""),
        (discovery.controls, "dim"),
        ((*discovery.sets, *discovery.singles), ""),
    ):
        for place, one in enumerate(effects):
            won = effects is discovery.finalists
            wins = share(discovery.resampled.get(one.label, float("nan"))) if won else "-"
            grid.add_row(
                plain_text(one.label), *_effect(one, lines), wins, style="bold" if won and not place else style
            )
        grid.add_section()
    best = discovery.finalists[0] if discovery.finalists else None
    grid.caption = (
        "k/n and 95 % interval. Bold: the winner. Dim: controls. Log-odds: change of those of refusing"
        + (f", on {best.harmful.n} harmful and {best.benign.n} plain prompts" if best else "")
        + ". KL: nats per token. Wins: share of resamples. Nothing here is a test result."
    )
    return grid


def _effect(one: Effect, lines: int) -> list[str]:
    rates = [rate_parts(rate) if rate else ("-",) for rate in (one.harmful_refused, one.benign_refused)]
    odds = [_two_decimals(x) for x in (one.harmful, one.benign)]
    costs = [span_parts(x.value, x.low, x.high) for x in ((one.kl, one.efficiency) if lines < 4 else (one.kl,))]
    return joined([*rates, *odds, *costs], lines)


def _two_decimals(x: Estimate) -> tuple[str, ...]:
    if not isfinite(x.value):
        return (NA,)
    ends = (f"[{x.low:.2f}, {x.high:.2f}]",) if isfinite(x.low) and isfinite(x.high) else ()
    return (f"{x.value:.2f}", *ends)


def plain_text(text: str) -> "Text":
    """`text` with brackets as they are, never read as markup."""
    from rich.text import Text

    return Text(text)


def fitting(layout: Callable[[int], "Table"], width: int | None, most: int = 3) -> "Table":
    """The first of `layout(1)` to `layout(most)`, ever narrower, that fits `width` columns, else the last."""
    from rich import get_console
    from rich.measure import Measurement

    console = get_console()
    if width is None:
        width = console.width
    options = console.options.update(max_width=1000)
    layouts = (layout(lines) for lines in range(1, most + 1))
    fits = (grid for grid in layouts if Measurement.get(console, options, grid).maximum <= width)
    return next(fits, None) or layout(most)


def new_grid(lines: int) -> "Table":
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, caption_justify="left")
    grid.padding = (0, 1 if lines < 3 else 0, 0, 0)
    return grid


def _layout(result: StudyResult, lines: int) -> "Table":
    grid = new_grid(lines)
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
    return joined([*map(rate_parts, rates), span_parts(row.kl, row.kl_low, row.kl_high)], lines)


def joined(cells: Sequence[tuple[str, ...]], lines: int) -> list[str]:
    """The parts of each cell over so many lines."""
    if lines == 1:
        return [" ".join(parts) for parts in cells]
    if lines > 2:
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
