"""How a latent was found, as a section of the study's page and as a page of its own for `demur select`.

Everything here was measured on the select split, so no number of this page is a result. Text that a model wrote enters
only escaped, and no figure carries any: see `demur.report.page`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from demur.report import figures, words
from demur.report.card import visible
from demur.report.page import Candidates, asset, candidates, embed, environment, flat, policy, steps, writable
from demur.report.table import discovery_line
from demur.types import Discovery, Effect, Estimate, Rate, Run

Standing = Literal["above", "below", "overlap", "unknown"]
"""Where one 95 % interval lies against another."""


class Method(NamedTuple):
    """What one method made of the winner, in words."""

    name: str
    proposed: str
    place: str
    halves: str
    """Share of its first latents that two halves of the prompts have in common."""
    winner_places: str
    """Place of the winner under each half."""


class Agreement(NamedTuple):
    """Share of the first latents that two methods have in common."""

    methods: list[str]
    rows: list[tuple[str, list[tuple[str, float]]]]
    """Method, and for each other its share in words and as a shade from 0 to 1."""


class Section(NamedTuple):
    """What the section shows beyond the discovery itself."""

    line: str
    """Which latent won, and how much it does."""
    looked_at: str
    """On how many prompts."""
    openings: list[str]
    """How the model begins a refusal, white space made visible."""
    wins: dict[str, str]
    """Share of resamples that each finalist wins, by its label."""
    against_controls: list[str]
    against_single: list[str]
    """A sentence for each set of latents."""
    methods: list[Method]
    agreement: Agreement
    candidates: Candidates
    curve: list[Effect]
    """The winner by value, its own included."""
    docs: dict[str, str]
    """What the fields of an `Effect` mean."""
    figures: dict[str, Any]


def section(discovery: Discovery) -> Section:
    """What `discovery.html.jinja` needs, as `found`, beside `discovery` and `figures`."""
    winner = discovery.finalists[0] if discovery.finalists else None
    marks: dict[int | None, str] = {i: "finalist" for one in discovery.finalists for i in one.latents}
    curve = _curve(discovery)
    return Section(
        line=discovery_line(discovery),
        looked_at=looked_at(winner),
        openings=[visible(text) for text in discovery.openings],
        wins={one.label: words.share(discovery.resampled.get(one.label, float("nan"))) for one in discovery.finalists},
        against_controls=against_controls(winner, discovery.controls) if winner else [],
        against_single=[against_single(*pair) for pair in zip(discovery.sets, discovery.singles, strict=True)],
        methods=_methods(discovery),
        agreement=_agreement(discovery),
        candidates=candidates(discovery.ranking, marks | {discovery.winner: "chosen"}),
        curve=curve,
        docs=words.field_docs(Effect) | {"resampled": words.field_docs(Discovery).get("resampled", "")},
        figures=build(curve),
    )


def render_discovery(discovery: Discovery, run: Run) -> str:
    """A page of its own: the section, and where its numbers come from."""
    scripts = {"plotly": get_plotlyjs(), "page": asset("page.js")}
    found = section(discovery)
    total = sum(discovery.seconds.values())
    html = (
        environment()
        .get_template("select.html.jinja")
        .render(
            discovery=discovery,
            found=found,
            alone=True,
            run=run,
            figures=found.figures,
            ranking=discovery.ranking,
            more_facts=[],
            config=flat(run.config),
            steps=steps(discovery.seconds, total),
            total_seconds=total,
            csp=policy(scripts.values()),
            css=Markup(asset("study.css")),
            scripts={name: Markup(text) for name, text in scripts.items()},
            figure_json=embed(found.figures),
        )
    )
    return writable(html)


def looked_at(winner: Effect | None) -> str:
    """On how many select prompts the numbers of the winner stand; they differ by what is measured."""
    if winner is None:
        return ""
    judged = [
        f"judged answers to {words.count(rate.n, kind + ' prompt')}"
        for rate, kind in ((winner.harmful_refused, "harmful"), (winner.benign_refused, "plain"))
        if rate
    ]
    read = f"log-odds of refusing on {words.count(winner.harmful.n, 'harmful prompt')} and {winner.benign.n} plain"
    damage = f"KL on {words.count(winner.kl.n, 'plain prompt')}"
    return f"For the winner: {words.listed([*judged, read, damage])}."


def standing(one: Estimate | Rate | None, other: Estimate | Rate | None) -> Standing:
    """Where the 95 % interval of `one` lies against that of `other`. A look, not a test."""
    if one is None or other is None:
        return "unknown"
    ends = [words.finite(x) for x in (one.low, one.high, other.low, other.high)]
    if None in ends or (isinstance(one, Rate) and not one.n) or (isinstance(other, Rate) and not other.n):
        return "unknown"
    return "above" if one.low > other.high else "below" if one.high < other.low else "overlap"


def against_controls(winner: Effect, controls: Sequence[Effect]) -> list[str]:
    """What the winner does, what controls do, and whether their intervals are apart; a sentence each."""
    if not controls:
        return []
    refusal = Counter(standing(winner.harmful, one.harmful) for one in controls)
    apart, near = refusal["above"], refusal["overlap"] + refusal["below"]
    if near:
        reading = (
            f"As {near} of {words.count(len(controls), 'control')} may change refusal as much, steering as such may "
            "explain part of the effect."
        )
    elif apart:
        which = "any control" if apart == len(controls) else f"any of the {apart} controls that can be compared"
        reading = f"So the effect on refusal is larger than that of {which}."
    else:
        reading = "So what steering as such does to refusal is not known here."
    return [
        f"On harmful prompts {winner.label} changes the log-odds of refusing by {words.estimate_text(winner.harmful)}, "
        f"at a KL of {words.estimate_text(winner.kl)} nats per token on plain prompts.",
        f"{words.count(len(controls), 'control')}: log-odds {_range(one.harmful.value for one in controls)}, "
        f"KL {_range(one.kl.value for one in controls)}.",
        f"Log-odds: {_tally(winner.harmful, [one.harmful for one in controls])}.",
        f"KL: {_tally(winner.kl, [one.kl for one in controls])}.",
        reading,
    ]


def against_single(some: Effect, winner: Effect) -> str:
    """Whether a set of latents costs less than the winner at a value at which it refuses about as much."""
    one, other = some.harmful_refused, winner.harmful_refused
    if one is None or other is None or not one.n or not other.n:
        return f"{some.label}: cannot tell, as refusals of harmful prompts were not judged on both sides."
    rates = f"{words.rate_text(one)} against {words.rate_text(other)}"
    if standing(one, other) == "below":
        return f"{some.label}: refuses fewer harmful prompts than {winner.label}, {rates}, so costs are not compared."
    costs = [
        ("Plain refused", some.benign_refused, winner.benign_refused),
        ("KL", some.kl, winner.kl),
    ]
    return f"{some.label} against {winner.label}: harmful prompts refused {rates}. " + (
        " ".join(f"{name} lower: {_lower(new, old)}." for name, new, old in costs)
    )


def _lower(new: Estimate | Rate | None, old: Estimate | Rate | None) -> str:
    texts = [
        words.rate_text(x) if isinstance(x, Rate) else words.estimate_text(x) if x else "not judged" for x in (new, old)
    ]
    answer = {
        "below": "yes",
        "above": "no, it is higher",
        "overlap": "cannot tell, the intervals overlap",
        "unknown": "cannot tell, not measured on both sides",
    }[standing(new, old)]
    return f"{answer} ({texts[0]} against {texts[1]})"


def _range(values: Iterable[float]) -> str:
    seen = sorted(x for x in values if words.finite(x) is not None)
    if not seen:
        return words.NA
    low, high = (words.span_parts(x, x, x)[0] for x in (seen[0], seen[-1]))
    return low if low == high else f"{low} to {high}"


def _tally(one: Estimate, others: Sequence[Estimate]) -> str:
    found = Counter(standing(one, other) for other in others)
    says: dict[Standing, str] = {
        "above": "lies above those of {}",
        "overlap": "overlaps those of {}",
        "below": "lies below those of {}",
        "unknown": "cannot be compared with those of {}",
    }
    parts = [text.format(found[where]) for where, text in says.items() if found[where]]
    return f"of {len(others)} intervals, the winner's {words.listed(parts)}"


def _methods(discovery: Discovery) -> list[Method]:
    names = dict.fromkeys([*discovery.places, *discovery.stability, *discovery.proposed_by])
    found = []
    for name in names:
        stability = discovery.stability.get(name)
        found.append(
            Method(
                name,
                "yes" if name in discovery.proposed_by else "no",
                _place(discovery.places[name]) if name in discovery.places else words.NA,
                words.share(stability.halves) if stability else words.NA,
                ", ".join(map(_place, stability.winner_places)) if stability and stability.winner_places else words.NA,
            )
        )
    return found


def _place(place: int) -> str:
    return str(place) if place else "not ranked"


def _agreement(discovery: Discovery) -> Agreement:
    table = discovery.agreement
    methods = list(dict.fromkeys([*table, *(name for row in table.values() for name in row)]))
    rows = []
    for name in methods:
        cells = []
        for other in methods:
            value = table.get(name, {}).get(other, table.get(other, {}).get(name, float("nan")))
            shade = min(max(words.finite(value) or 0.0, 0.0), 1.0)
            cells.append(("–", 0.0) if other == name else (words.share(value), shade))
        rows.append((name, cells))
    return Agreement(methods, rows)


def _curve(discovery: Discovery) -> list[Effect]:
    """The winner by value; empty where it was measured at no value but its own."""
    if not discovery.curve:
        return []
    found = {one.values[0]: one for one in (*discovery.curve, *discovery.finalists[:1]) if one.values}
    return [found[value] for value in sorted(found)]


def build(curve: Sequence[Effect]) -> dict[str, Any]:
    """The figures, by the id of their place in the page."""
    refusal = (("harmful", "steered", "harmful"), ("benign", "control", "plain benign"))
    made = {
        "curve-refusal": _plot(curve, "change of log-odds", refusal),
        "curve-kl": _plot(curve, "nats per token", (("kl", "steered", "KL"),)),
    }
    if made["curve-kl"] is not None:
        made["curve-kl"].update_yaxes(rangemode="tozero", nticks=6)
    return {name: figure.to_plotly_json() for name, figure in made.items() if figure is not None}


def _plot(curve: Sequence[Effect], unit: str, series: Sequence[tuple[str, str, str]]) -> go.Figure | None:
    """Estimates of `curve` with their intervals; `series` are field, colour and words. None without a point."""
    figure = figures.canvas(300, unit)
    x = [one.values[0] for one in curve]
    for field, role, what in series:
        seen: list[Estimate] = [getattr(one, field) for one in curve]
        figure.add_scatter(
            x=x,
            y=[words.finite(one.value) for one in seen],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [words.finite(one.high - one.value) or 0.0 for one in seen],
                "arrayminus": [words.finite(one.value - one.low) or 0.0 for one in seen],
                "thickness": 1,
                "width": 0,
            },
            mode="lines+markers",
            line=figures.line(role),
            marker={"size": 8, "symbol": "circle" if role == "steered" else "diamond"},
            hovertext=[
                f"{what} at {words.number(value)}<br>{words.estimate_text(one)}, {one.n} prompts"
                for value, one in zip(x, seen, strict=True)
            ],
            hoverinfo="text",
            meta={"role": role},
        )
    if not any(y is not None for trace in figure.data for y in trace.y or ()):
        return None
    figure.update_xaxes(title_text="clamp value", tickvals=x if len(x) < 9 else None)
    return figure
