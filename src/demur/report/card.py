"""A feature card as one HTML file that opens anywhere, offline, and loads nothing: see `demur.report.page`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from demur.report import figures, words
from demur.report.page import asset, embed, environment, policy, writable
from demur.types import CurvePoint, Example, FeatureCard


class Token(NamedTuple):
    """A token as it is shown."""

    text: str
    """With line breaks and tabs visible, and spaces where there is nothing else."""
    title: str
    share: float
    """Activation over the card's largest, 0 to 1."""
    peak: bool


def render(card: FeatureCard) -> str:
    """The whole card as HTML text."""
    scripts = {"plotly": get_plotlyjs(), "page": asset("page.js")}
    html = (
        environment()
        .get_template("card.html.jinja")
        .render(
            card=card,
            passages=[
                (title, [(one, tokens(one, card.max_activation)) for one in some])
                for title, some in (("Most active", card.examples), ("From the middle of its activations", card.middle))
                if some
            ],
            tokens_said=[("Raised most", card.promoted), ("Lowered most", card.suppressed)],
            visible=visible,
            firing=[(one.type, share(one.active, one.tokens), one.active, one.tokens) for one in card.firing],
            rate=share(card.active, card.tokens),
            figures=(plots := build(card)),
            docs=words.field_docs(CurvePoint),
            csp=policy(scripts.values()),
            css=Markup(asset("study.css")),
            scripts={name: Markup(text) for name, text in scripts.items()},
            figure_json=embed(plots),
        )
    )
    return writable(html)


def tokens(example: Example, largest: float) -> list[Token]:
    """The tokens of `example`; `largest` is the activation that is shown strongest."""
    return [
        Token(visible(text), f"{words.number(value)}", value / largest if largest else 0.0, place == example.peak)
        for place, (text, value) in enumerate(zip(example.tokens, example.activations, strict=True))
    ]


def visible(text: str) -> str:
    """`text` whose white space can be seen; a token that only begins a character is a dotted circle."""
    if not text:
        return "◌"
    text = text.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥")
    return text if text.strip(" ") else "␣" * len(text)


def share(k: int, n: int) -> str:
    """`2.4 %`, with two significant digits: a latent may fire on very few tokens."""
    return f"{words.number(100 * k / n, 2)} %" if n else words.NA


def build(card: FeatureCard) -> dict[str, Any]:
    """The figures, by the id of their place in the page."""
    found: dict[str, go.Figure] = {}
    if card.curve:
        found["refusal"] = _curve(
            card.curve, "change of log-odds", (("harmful", "steered", "harmful"), ("benign", "control", "plain benign"))
        )
        found["kl"] = _curve(card.curve, "nats per token", (("kl", "steered", "KL"),))
        found["kl"].update_yaxes(rangemode="tozero", nticks=6)
    if card.active:
        found["histogram"] = _histogram(card)
    return {name: figure.to_plotly_json() for name, figure in found.items()}


def _curve(points: Sequence[CurvePoint], unit: str, series: Sequence[tuple[str, str, str]]) -> go.Figure:
    """Fields of `points` with their intervals as bands; `series` are field, colour and words."""
    figure = figures.canvas(300, unit)
    x = [point.value for point in points]
    for field, role, what in series:
        low, y, high = (
            [words.finite(getattr(point, field + end)) for point in points] for end in ("_low", "", "_high")
        )
        figure.add_scatter(
            x=x + x[::-1],
            y=high + low[::-1],
            fill="toself",
            mode="lines",
            line={"width": 0},
            hoverinfo="skip",
            meta={"role": role, "band": True},
        )
        spans = (" ".join(words.span_parts(*span(point, field))) for point in points)
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines+markers",
            line=figures.line(role),
            marker={"size": 8, "symbol": "circle" if role == "steered" else "diamond"},
            hovertext=[
                f"{what} at {words.number(point.value)}<br>{text}" for point, text in zip(points, spans, strict=True)
            ],
            hoverinfo="text",
            meta={"role": role},
        )
    figure.update_xaxes(title_text="clamp value", tickvals=x if len(x) < 9 else None)
    return figure


def span(point: CurvePoint, field: str) -> tuple[float, float, float]:
    """A field of `point` and its interval."""
    return getattr(point, field), getattr(point, f"{field}_low"), getattr(point, f"{field}_high")


def _histogram(card: FeatureCard) -> go.Figure:
    width = card.max_activation / len(card.histogram)
    edges = [words.number(i * width) for i in range(len(card.histogram) + 1)]
    figure = figures.canvas(230, "tokens")
    figure.add_bar(
        x=[(i + 0.5) * width for i in range(len(card.histogram))],
        y=list(card.histogram),
        width=width,
        hovertext=[f"{edges[i]} to {edges[i + 1]}<br>{n} tokens" for i, n in enumerate(card.histogram)],
        hoverinfo="text",
        meta={"role": "other"},
    )
    figure.update_xaxes(title_text="activation, latent units")
    return figure
