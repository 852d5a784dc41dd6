"""The front of a search: a table for the terminal, and one HTML file that opens anywhere and loads nothing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from demur.report import figures, words
from demur.report.page import asset, embed, environment, flat, policy, steps, writable
from demur.results import Optimized, Tried
from demur.types import Rate, Run

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {
    "harmful_refused": "harmful refused",
    "benign_refused": "benign refused",
    "benign_degenerate": "benign broken",
    "capability": "capability",
}
"""Rate fields of a `Tried` and their headings, in the order of every table."""
OBJECTIVES = {
    "harmful": "harmful prompts refused",
    "benign": "benign prompts lost (refused or broken)",
    "kl": "KL",
    "capability": "capability",
}
RULES = {
    "inert": "did nothing",
    "broken": "broke answers",
    "dominated": "surely worse than a judged one",
    "unscored": "could not be scored",
}


def front_table(found: Optimized) -> "Table":
    """The unsteered model, then the front; each rate with k/n and its 95 % interval (Wilson's)."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1))
    table.add_column("trial", justify="right")
    for heading in (*COLUMNS.values(), "KL"):
        table.add_column(heading)
    table.add_column("spec", overflow="fold")
    for one in (found.unsteered, *found.front):
        cells = ["\n".join(words.rate_parts(getattr(one, field))) for field in COLUMNS]
        kl = "0" if one.number < 0 else "\n".join(words.span_parts(one.kl.value, one.kl.low, one.kl.high))
        table.add_row("-" if one.number < 0 else str(one.number), *cells, kl, one.label, end_section=one.number < 0)
    return table


def summary(found: Optimized) -> str:
    """How many trials there were and what became of them."""
    judged = len(found.front) + len(found.others)
    pruned = [f"{n} {RULES.get(rule, rule)}" for rule, n in sorted(found.pruned.items())]
    line = (
        f"{words.count(judged, 'spec')} judged, {len(found.front)} on the front of "
        f"{words.listed([OBJECTIVES[one] for one in found.objectives])}"
    )
    if pruned:
        line += f"; {sum(found.pruned.values())} stopped by the screen ({', '.join(pruned)})"
    unscored = sum(one.unscored for one in (found.unsteered, *found.front, *found.others))
    if unscored:
        line += f"; {words.count(unscored, 'answer')} could not be scored and are in no denominator"
    return f"{line}. All on select prompts: the best of many look better than they are, so report on test prompts."


def render(found: Optimized, run: Run) -> str:
    """The page as HTML text."""
    scripts = {"plotly": get_plotlyjs(), "page": asset("page.js")}
    seconds = found.seconds
    total = sum(seconds.values())
    html = (
        environment()
        .get_template("optimize.html.jinja")
        .render(
            found=found,
            run=run,
            summary=summary(found),
            rows=[found.unsteered, *found.front],
            columns=COLUMNS,
            docs=words.field_docs(Tried),
            figures=(plots := build(found)),
            ranking=None,
            more_facts=[("Judge", found.judge)],
            steps=steps(seconds, total),
            total_seconds=total,
            config=flat(run.config),
            csp=policy(scripts.values()),
            css=Markup(asset("study.css")),
            scripts={name: Markup(text) for name, text in scripts.items()},
            figure_json=embed(plots),
        )
    )
    return writable(html)


def build(found: Optimized) -> dict[str, Any]:
    """The figures, by the id of their place in the page."""
    lost = _figure(
        found, "benign prompts lost, %", lambda one: 100 * one.benign_lost.value, lambda one: one.benign_lost
    )
    kl = _figure(found, "KL, nats per token", lambda one: one.kl.value, None)
    return {"lost": lost.to_plotly_json(), "kl": kl.to_plotly_json()}


def _figure(found: Optimized, title: str, x: Any, rate: Any) -> go.Figure:
    figure = figures.canvas(420, "harmful prompts refused, %")
    for role, what, some in (
        ("control", "judged", found.others),
        ("steered", "front", found.front),
        ("steered", "unsteered", (found.unsteered,)),
    ):
        kept = [one for one in some if one.harmful_refused.n and words.finite(x(one)) is not None]
        if not kept:
            continue
        front = what == "front"
        figure.add_scatter(
            x=[x(one) for one in kept],
            y=[100 * one.harmful_refused.value for one in kept],
            error_x=figures.whiskers([rate(one) for one in kept]) if front and rate else None,
            error_y=figures.whiskers([one.harmful_refused for one in kept]) if front else None,
            mode="markers+text" if front else "markers",
            marker={"size": 8, "symbol": [_symbol(what)] * len(kept)},
            text=[str(one.number) for one in kept] if front else None,
            textposition="top left",
            hovertext=[hover(one) for one in kept],
            hoverinfo="text",
            meta={"role": role},
        )
    figure.update_yaxes(range=[-3, 106])
    figure.update_xaxes(title_text=title, rangemode="tozero")
    return figure


def _symbol(what: str) -> str:
    return {"front": "circle", "judged": "diamond", "unsteered": "square-open"}[what]


def hover(one: Tried) -> str:
    """What a point says: its trial, the spec in words, and all that was measured."""
    name = "unsteered" if one.number < 0 else f"trial {one.number}: {one.label}"
    lines: Sequence[str] = [f"{heading} {words.rate_text(_rate(one, field))}" for field, heading in COLUMNS.items()]
    return "<br>".join([name, *lines, f"KL {words.estimate_text(one.kl)} nats per token"])


def _rate(one: Tried, field: str) -> Rate:
    rate: Rate = getattr(one, field)
    return rate
