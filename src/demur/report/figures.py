"""The figures of a study as plotly JSON.

Python decides what is drawn; colours are left to the page, which knows whether it is light or dark: every
trace carries `meta.role`, the name of a colour in `study.css`. No model or prompt text enters a figure.
"""

from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go

from demur.report.words import finite, number, rate_text, span_parts
from demur.types import UNSTEERED, Estimate, Rate, StudyResult, StudyRow

MEASURES = {
    "harmful_refused": "Harmful refused",
    "benign_refused": "Plain benign refused",
    "lookalike_refused": "Look-alikes refused",
    "degenerate": "Degenerate text",
    "capability": "Capability",
}
"""Rate fields of a `StudyRow` and their headings, in the order of every table and figure."""

Series = tuple[str, str, int, list[StudyRow]]
"""Role, what is clamped, its latent, its rows by value; the unsteered row comes first in both series."""


def build(result: StudyResult) -> dict[str, Any]:
    """Every figure that has a point to show, by the id of its place in the page."""
    figures = {"tradeoff": _tradeoff(result), "kl": _kl(result), "candidates": _candidates(result)}
    figures |= {f"dose-{field}": _dose(result, field) for field in MEASURES}
    return {name: figure.to_plotly_json() for name, figure in figures.items() if figure is not None}


def kl_is_log(result: StudyResult) -> bool:
    """Whether KL spans so much that only a log axis shows the small values."""
    seen = [row.kl for row in (*result.rows, *result.control_rows) if finite(row.kl) and row.kl > 0]
    return bool(seen) and max(seen) > 50 * min(seen)


def _series(result: StudyResult) -> list[Series]:
    start = [row for row in result.rows if row.spec == UNSTEERED]
    steered = sorted((row for row in result.rows if row.spec != UNSTEERED), key=lambda row: row.value)
    control = sorted(result.control_rows, key=lambda row: row.value)
    series: list[Series] = []
    if control and result.control_latent is not None:
        series.append(("control", "control", result.control_latent, start + control))
    series.append(("steered", "steered", result.latent, start + steered))
    return series


def _tradeoff(result: StudyResult) -> go.Figure | None:
    """Harmful refused against benign refused; the page shows the traces of one `meta.set` at a time."""
    figure = canvas(440, "harmful prompts refused, %")
    top = 0.0
    for field, group in (("benign_refused", "plain"), ("lookalike_refused", "lookalike")):
        for role, what, latent, rows in _series(result):
            kept = [row for row in rows if row.harmful_refused.n and getattr(row, field).n]
            if not kept:
                continue
            x = [getattr(row, field) for row in kept]
            y = [row.harmful_refused for row in kept]
            top = max(top, *(100 * (finite(rate.high) or rate.value) for rate in x))
            figure.add_scatter(
                x=[100 * rate.value for rate in x],
                y=[100 * rate.value for rate in y],
                error_x=whiskers(x),
                error_y=whiskers(y),
                mode="lines+markers+text" if role == "steered" else "lines+markers",
                line=line(role),
                marker=_marker(role, kept),
                text=[_label(row) for row in kept],
                textposition="top left",
                hovertext=[
                    f"{_name(row, what, latent)}<br>harmful refused {rate_text(row.harmful_refused)}"
                    f"<br>{MEASURES[field].lower()} {rate_text(getattr(row, field))}"
                    for row in kept
                ],
                hoverinfo="text",
                visible=group == "plain",
                meta={"role": role, "set": group},
            )
            if role == "control":
                figure.layout.annotations += _column(group, kept, [100 * rate.value for rate in x])
    if not figure.data:
        return None
    figure.update_yaxes(range=[-3, 106])
    figure.update_xaxes(range=[-3, min(106, max(20.0, 1.08 * top))], title_text="plain benign prompts refused, %")
    return figure


def _dose(result: StudyResult, field: str) -> go.Figure | None:
    """One measure by clamp value, with its interval as a band."""

    def read(row: StudyRow) -> tuple[float | None, float | None, float | None, str]:
        rate: Rate = getattr(row, field)
        if not rate.n:
            return None, None, None, rate_text(rate)
        y, low, high = (finite(100 * x) for x in (rate.value, rate.low, rate.high))
        return y, low, high, rate_text(rate)

    figure = _bands(result, "%", read)
    if figure is not None:
        figure.update_yaxes(range=[-3, 103], tickvals=[0, 25, 50, 75, 100])
    return figure


def _kl(result: StudyResult) -> go.Figure | None:
    log = kl_is_log(result)

    def read(row: StudyRow) -> tuple[float | None, float | None, float | None, str]:
        text = " ".join(span_parts(row.kl, row.kl_low, row.kl_high)) + " nats per token"
        shown = [finite(x) if not log or x > 0 else None for x in (row.kl, row.kl_low, row.kl_high)]
        return shown[0], shown[1], shown[2], text

    figure = _bands(result, "nats per token", read)
    if figure is not None:
        figure.update_yaxes(
            {"type": "log", "dtick": 1} if log else {"type": "linear", "rangemode": "tozero", "nticks": 6}
        )
    return figure


def _bands(
    result: StudyResult,
    unit: str,
    read: Callable[[StudyRow], tuple[float | None, float | None, float | None, str]],
) -> go.Figure | None:
    figure = canvas(230, unit)
    for role, what, latent, rows in _series(result):
        seen = [(row, *read(row)) for row in rows]
        banded = [(row.value, low, high) for row, y, low, high, _ in seen if None not in (y, low, high)]
        figure.add_scatter(
            x=[x for x, _, _ in banded] + [x for x, _, _ in reversed(banded)],
            y=[high for _, _, high in banded] + [low for _, low, _ in reversed(banded)],
            fill="toself",
            mode="lines",
            line={"width": 0},
            hoverinfo="skip",
            meta={"role": role, "band": True},
        )
        figure.add_scatter(
            x=[row.value for row, *_ in seen],
            y=[y for _, y, *_ in seen],
            mode="lines+markers",
            line=line(role),
            marker=_marker(role, rows),
            hovertext=[f"{_name(row, what, latent)}<br>{text}" for row, *_, text in seen],
            hoverinfo="text",
            meta={"role": role},
        )
    if not any(y is not None for trace in figure.data for y in trace.y or ()):
        return None
    values = sorted({row.value for *_, rows in _series(result) for row in rows})
    figure.update_xaxes(title_text="clamp value", tickvals=values if len(values) < 9 else None)
    return figure


def _candidates(result: StudyResult) -> go.Figure | None:
    scores = result.ranking.scores
    if not any(finite(item.score) is not None for item in scores):
        return None
    marks = {result.latent: "chosen", result.control_latent: "control"}
    roles = {result.latent: "steered", result.control_latent: "control"}
    figure = canvas(300, "score")
    figure.add_bar(
        x=list(range(1, len(scores) + 1)),
        y=[finite(item.score) for item in scores],
        hovertext=[
            f"latent {item.latent}{', ' + marks[item.latent] if item.latent in marks else ''}"
            f"<br>rank {rank}, score {number(item.score, 4)}"
            for rank, item in enumerate(scores, 1)
        ],
        hoverinfo="text",
        meta={"role": "other", "roles": [roles.get(item.latent, "other") for item in scores]},
    )
    for rank, item in enumerate(scores, 1):
        if item.latent in marks and finite(item.score) is not None:
            figure.add_annotation(
                x=rank,
                y=item.score,
                text=f"{marks[item.latent]}: {item.latent}",
                showarrow=True,
                arrowhead=0,
                ax=0,
                ay=-22 if item.score >= 0 else 22,
                xanchor="left" if rank <= len(scores) / 2 else "right",
            )
    figure.update_xaxes(title_text="rank")
    return figure


def canvas(height: int, y_title: str) -> go.Figure:
    """An empty figure of `height` pixels in the style that all figures share."""
    axis = {"zeroline": False, "fixedrange": True, "automargin": True, "ticks": "outside", "ticklen": 4}
    return go.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 8, "r": 12, "t": 14, "b": 8},
            "showlegend": False,
            "hovermode": "closest",
            "dragmode": False,
            "xaxis": {**axis, "title": {"font": {"size": 13}, "standoff": 8}},
            "yaxis": {**axis, "title": {"text": y_title, "font": {"size": 13}, "standoff": 8}},
        }
    )


def whiskers(rates: Sequence[Rate | Estimate], thickness: float = 1) -> dict[str, Any]:
    """Error bars of fractions on an axis in percent or points; none where an end is not known."""
    ends = [(finite(rate.low - rate.value), finite(rate.high - rate.value)) for rate in rates]
    return {
        "type": "data",
        "symmetric": False,
        "array": [100 * (up or 0.0) for _, up in ends],
        "arrayminus": [-100 * (down or 0.0) for down, _ in ends],
        "thickness": thickness,
        "width": 0,
    }


def line(role: str) -> dict[str, Any]:
    """The line of a trace; dashes tell roles apart without colour."""
    return {"width": 2, "dash": "solid" if role == "steered" else "dash"}


def _marker(role: str, rows: Sequence[StudyRow]) -> dict[str, Any]:
    shape = "circle" if role == "steered" else "diamond"
    return {"size": 8, "symbol": ["square-open" if row.spec == UNSTEERED else shape for row in rows]}


def _label(row: StudyRow) -> str:
    return "" if row.spec == UNSTEERED else number(row.value)


def _column(group: str, rows: Sequence[StudyRow], x: Sequence[float]) -> tuple[go.layout.Annotation, ...]:
    """Labels of control points, in a column with leaders: the points crowd where the unsteered model is."""
    points = sorted((100 * row.harmful_refused.value, at, _label(row)) for at, row in zip(x, rows, strict=True))
    points = [point for point in points if point[2]]
    places: list[float] = []
    for y, _, _ in points:
        places.append(max(y, places[-1] + 6) if places else y)
    sink = sum(place - y for place, (y, _, _) in zip(places, points, strict=True)) / max(1, len(points))
    return tuple(
        go.layout.Annotation(
            name=group,
            text=label,
            x=at,
            y=y,
            ax=max(x) + 6,
            ay=max(0.0, place - sink),
            axref="x",
            ayref="y",
            xanchor="left",
            arrowhead=0,
            arrowwidth=1,
            standoff=4,
        )
        for place, (y, at, label) in zip(places, points, strict=True)
    )


def _name(row: StudyRow, what: str, latent: int) -> str:
    return "unsteered" if row.spec == UNSTEERED else f"{what}: latent {latent} at {number(row.value)}"
