"""The figures of a diagnosis as plotly JSON; see `demur.report.figures` for how colours come in."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from demur.report import figures
from demur.report.words import estimate_text, finite, number, rate_text
from demur.results import Diagnosis, WhySide
from demur.types import UNSTEERED, Estimate, Rate

Bar = tuple[str, str, Estimate]
"""Name, role, and what is drawn."""
ROLES = {"edit": "steered", "control": "control", "random": "other", "means": "partial", "prompt": "complied"}
"""Colours by kind of side; all others are parts of the edit."""
LINES = {
    "edit": ("steered", "the edit", "circle"),
    "controls": ("control", "control latents, mean", "diamond"),
    "randoms": ("other", "random directions, mean", "x"),
    "means": ("partial", "difference in means", "square"),
    UNSTEERED: ("ink", "unsteered", "circle-open"),
    "control 1": ("control", "the first control latent", "diamond"),
    "random 1": ("other", "the first random direction", "x"),
}
"""By side: colour, name and mark of its line."""
PLACED = ("edit", "controls", "randoms", "means", UNSTEERED)
"""Sides in figures by place."""
DOSED = ("edit", "control 1", "random 1", "means")
"""Sides that have doses."""
_ROW = 34
"""Pixels of a bar."""


class Point(NamedTuple):
    """A point of a line with its interval."""

    x: float | str
    y: float | None
    low: float | None
    high: float | None
    text: str


def role(side: WhySide) -> str:
    """Its colour."""
    return ROLES.get(side.kind, "steered")


def build(result: Diagnosis) -> dict[str, Any]:
    """Every figure that has something to show, by the id of its place in the page."""
    sides = {side.key: side for side in result.sides}
    whole = [side for side in result.sides if side.dose == 1 and side.kind not in ("only", "but")]
    made: dict[str, go.Figure | None] = {
        "sides": bars([(side.label, role(side), side.kl) for side in whole], "KL, nats per token"),
        "reconstruction": bars(
            [
                (sides[key].label, "steered", sides[key].kl)
                for key in ("edit", "preserving", "reconstruction", "reconstructed")
                if key in sides
            ],
            "KL, nats per token",
        ),
        "pushes": _pushes(whole),
        "only": _tokens(result, "only"),
        "but": _tokens(result, "but"),
        "positions": _by_position(result, "kl", "nats"),
        "types": _by_type(result, "kl", "KL, nats per token"),
        "ratio": _by_type(result, "ratio", "norm after / before"),
        "cosine": _by_type(result, "cosine", "cosine of before and after"),
        "norms": _by_position(result, "ratio", "norm after / before"),
        "distance": _by_block(result, "beyond", "share of tokens beyond"),
        "harm": _by_block(result, "harm", "0 plain, 1 harmful"),
        "refusal": _by_block(result, "refusal", "0 answered, 1 refused"),
        "switched": bars(
            [
                (f"{name}: {at}", colour, one.estimate)
                for measure, name, colour in (("on", "switched on", "steered"), ("off", "switched off", "control"))
                for one in result.numbers
                if (one.side, one.measure) == ("edit", measure)
                for at in (one.at,)
            ],
            "latents per token",
        ),
        "dose-kl": _doses(result, lambda side: side.kl, "nats per token"),
        "dose-odds": _doses(result, lambda side: side.log_odds, "change of log-odds"),
        "dose-harmful": _doses(result, lambda side: side.harmful_refused, "%"),
        "dose-plain": _doses(result, lambda side: side.plain_refused, "%"),
        "dose-degenerate": _doses(result, lambda side: side.degenerate, "%"),
    }
    return {name: figure.to_plotly_json() for name, figure in made.items() if figure is not None}


def bars(rows: Sequence[Bar], unit: str) -> go.Figure | None:
    """One bar for each of `rows`, from the top, with its interval."""
    kept = [row for row in rows if finite(row[2].value) is not None]
    if not kept:
        return None
    figure = figures.canvas(60 + _ROW * len(kept), "")
    figure.add_bar(
        y=[name for name, _, _ in kept],
        x=[one.value for _, _, one in kept],
        orientation="h",
        error_x=_error([one for _, _, one in kept]),
        hovertext=[f"{name}<br>{estimate_text(one)}, {one.n} prompts" for name, _, one in kept],
        hoverinfo="text",
        meta={"role": kept[0][1], "roles": [colour for _, colour, _ in kept]},
    )
    figure.update_yaxes(autorange="reversed", ticks="")
    figure.update_xaxes(title_text=unit, rangemode="tozero")
    return figure


def _error(some: Sequence[Estimate]) -> dict[str, Any]:
    ends = [(finite(one.high - one.value) or 0.0, finite(one.value - one.low) or 0.0) for one in some]
    return {
        "type": "data",
        "symmetric": False,
        "array": [up for up, _ in ends],
        "arrayminus": [down for _, down in ends],
        "thickness": 1.5,
        "width": 0,
    }


def _pushes(sides: Sequence[WhySide]) -> go.Figure | None:
    """Damage against the gain in refusing, a mark for each side."""
    kept = [side for side in sides if finite(side.log_odds.value) is not None and finite(side.kl.value) is not None]
    if not kept:
        return None
    figure = figures.canvas(400, "change of refusal log-odds, harmful prompts")
    symbols = {"edit": "circle", "control": "diamond", "random": "x", "means": "square", "prompt": "star"}
    for side in kept:
        figure.add_scatter(
            x=[side.kl.value],
            y=[side.log_odds.value],
            error_x=_error([side.kl]),
            error_y=_error([side.log_odds]),
            mode="markers",
            marker={"size": 10, "symbol": symbols.get(side.kind, "circle-open")},
            hovertext=[f"{side.label}<br>KL {estimate_text(side.kl)}<br>log-odds {estimate_text(side.log_odds)}"],
            hoverinfo="text",
            meta={"role": role(side)},
        )
    figure.update_xaxes(title_text="KL on plain prompts, nats per token", rangemode="tozero")
    return figure


def _tokens(result: Diagnosis, kind: str) -> go.Figure | None:
    """KL and refusing left when some tokens are steered, as shares of those of the whole edit."""
    labels = {side.key: side.label for side in result.sides if side.kind == kind}
    figure = figures.canvas(70 + _ROW * len(labels), "")
    for measure, colour, symbol in (("kl", "control", "diamond"), ("log_odds", "steered", "circle")):
        rows = [
            (labels[one.first], one.ratio)
            for one in result.contrasts
            if (one.measure, one.second) == (measure, "edit") and one.first in labels and _clear(one.ratio)
        ]
        figure.add_scatter(
            y=[name for name, _ in rows],
            x=[one.value for _, one in rows],
            error_x=_error([one for _, one in rows]),
            mode="markers",
            marker={"size": 10, "symbol": symbol},
            hovertext=[
                f"{name}<br>{'KL' if measure == 'kl' else 'refusing'} {estimate_text(one)}" for name, one in rows
            ],
            hoverinfo="text",
            meta={"role": colour},
        )
    if not any(len(trace.x) for trace in figure.data):
        return None
    figure.update_yaxes(autorange="reversed", ticks="")
    figure.update_xaxes(title_text="of the whole edit's (1: as much)")
    return figure


def _clear(one: Estimate) -> bool:
    """Whether the ratio means something: its interval has ends."""
    return all(finite(x) is not None for x in (one.value, one.low, one.high))


def _by_position(result: Diagnosis, measure: str, unit: str) -> go.Figure | None:
    def points(side: str) -> list[Point]:
        found = [
            (int(one.at), one.estimate)
            for one in result.numbers
            if (one.side, one.measure) == (side, measure) and one.at.lstrip("-").isdigit()
        ]
        # a mean over one or two prompts, of the longest answers, says little
        return [_point(at, one) for at, one in sorted(found) if one.n >= min(8, result.plain)]

    names = [name for name in PLACED if name != UNSTEERED]
    figure = _lines([(name, points(name)) for name in names], unit, 300)
    if figure is not None:
        figure.update_xaxes(title_text="token, counted from the first of the answer (0)")
    return figure


def _by_type(result: Diagnosis, measure: str, unit: str) -> go.Figure | None:
    rows = [
        (one.at, "steered", one.estimate)
        for one in result.numbers
        if (one.side, one.measure) == ("edit", measure) and not one.at.lstrip("-").isdigit()
    ]
    return bars(rows, unit)


def _by_block(result: Diagnosis, measure: str, unit: str) -> go.Figure | None:
    def points(side: str) -> list[Point]:
        found = [
            (int(one.at.split(".")[1]), one.estimate)
            for one in result.numbers
            if (one.side, one.measure) == (side, measure)
        ]
        return [_point(at, one) for at, one in sorted(found)]

    drawn = [(name, points(name)) for name in PLACED]
    figure = _lines(drawn, unit, 300, band=False)
    if figure is not None:
        figure.update_xaxes(title_text="block", tickvals=sorted({point.x for _, some in drawn for point in some}))
    return figure


def _doses(result: Diagnosis, read: Callable[[WhySide], Estimate | Rate | None], unit: str) -> go.Figure | None:
    drawn = []
    for key in DOSED:
        start = read(result.unsteered)
        if isinstance(start, Estimate):
            start = Estimate(0.0, 0.0, 0.0, start.n)
        rows = [(0.0, start)]
        rows += [(side.dose, read(side)) for side in result.sides if side.key.split(" x ")[0] == key]
        points = [_point(dose, one) for dose, one in sorted(rows, key=lambda row: row[0]) if one is not None]
        if len(points) > 1:
            drawn.append((key, points))
    figure = _lines(drawn, unit, 240)
    if figure is not None:
        figure.update_xaxes(title_text="dose", tickvals=sorted({point.x for _, some in drawn for point in some}))
    return figure


def _point(x: float, one: Estimate | Rate) -> Point:
    if isinstance(one, Rate):
        value, low, high = (finite(100 * end) if one.n else None for end in (one.value, one.low, one.high))
        return Point(x, value, low, high, rate_text(one))
    return Point(x, finite(one.value), finite(one.low), finite(one.high), f"{estimate_text(one)}, {one.n} prompts")


def _lines(drawn: Sequence[tuple[str, Sequence[Point]]], unit: str, height: int, band: bool = True) -> go.Figure | None:
    figure = figures.canvas(height, unit)
    for name, points in drawn:
        colour, what, symbol = LINES[name]
        seen = [point for point in points if point.y is not None]
        ends = [point for point in seen if point.low is not None and point.high is not None]
        if band and len(ends) > 1:
            figure.add_scatter(
                x=[point.x for point in ends] + [point.x for point in reversed(ends)],
                y=[point.high for point in ends] + [point.low for point in reversed(ends)],
                fill="toself",
                mode="lines",
                line={"width": 0},
                hoverinfo="skip",
                meta={"role": colour, "band": True},
            )
        if seen:
            figure.add_scatter(
                x=[point.x for point in seen],
                y=[point.y for point in seen],
                error_y=None
                if band
                else {
                    "type": "data",
                    "symmetric": False,
                    "array": [(p.high or 0) - (p.y or 0) if p.high is not None else 0 for p in seen],
                    "arrayminus": [(p.y or 0) - (p.low or 0) if p.low is not None else 0 for p in seen],
                    "thickness": 1.5,
                    "width": 0,
                },
                mode="lines+markers",
                line=figures.line(colour),
                marker={"size": 7, "symbol": symbol},
                hovertext=[f"{what} at {number(float(point.x))}<br>{point.text}" for point in seen],
                hoverinfo="text",
                meta={"role": colour},
            )
    return figure if figure.data else None
