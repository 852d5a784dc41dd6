"""Attacks as one HTML page that opens anywhere, offline, and loads nothing: see `demur.report.page`."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite
from typing import Any, NamedTuple

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from demur.report import figures, words
from demur.report.escape import printable
from demur.report.page import asset, embed, environment, flat, policy, steps, writable
from demur.results import AttackContrast, AttackReport, AttackSide, End, Turn
from demur.types import Estimate, Rate, Run

_OUTCOMES = {True: "reached its objective", False: "did not reach its objective", None: "could not be scored"}
_WHY = {
    "not understood": ", then the attacker wrote no question that could be read",
    "no room": ", then the conversation filled the model's context",
}
_PAIRED = {
    "stopped": "stopped: success unsteered only",
    "through": "let through: success steered only",
    "both": "success on both sides",
    "neither": "success on neither",
    "unscored": "unscored on a side",
}
"""What became of a conversation on two sides; `attack.js` tells which."""
_ALONE = {"yes": "reached its objective", "no": "did not reach it", "unscored": "could not be scored"}
"""The same where there is one side only."""
_SIDE_MEANINGS = {
    "Attack success rate": "success",
    "Objectives reached": "objectives",
    "Unscored": "unscored",
    "Turns to success": "turns_to_success",
    "Turns": "turns",
    "Taken back": "backtracks",
    "Refused": "refused",
    "Degenerate": "degenerate",
}
_CONTRAST_MEANINGS = {
    "Difference": "difference",
    "p, Holm": "p_holm",
    "p": "p",
    "p over conversations": "p_conversations",
    "Objectives": "clusters",
    "Stopped": "stopped",
    "Let through": "let_through",
    "Left out": "left_out",
}
"""Heading and field, as for sides."""
_MARKS = (
    ("conversations", "steered", "circle", 0.0),
    ("objectives", "control", "diamond-open", -0.26),
)
"""What a mark counts, its colour and shape, and how far below its row it is; `attack.css` has the same marks."""
_NAME = 46
"""Characters of a name that fit over its line in the narrowest figure."""
_MANY = 16
"""Objectives from which on their table scrolls."""


class SideRow(NamedTuple):
    """A side as it is shown."""

    name: str
    success: Rate
    objectives: Rate
    unscored: int
    turns_to_success: str
    turns: str
    backtracks: str
    refused: Rate
    degenerate: Rate


class ContrastRow(NamedTuple):
    """A contrast as it is shown; its difference in points."""

    base: str
    steered: str
    place: int
    """Of the steered side, the base being 0."""
    difference: str
    interval: str
    """In brackets; empty where there is none."""
    n: int
    p_holm: str
    p: str
    p_conversations: str
    clusters: int
    stopped: list[str]
    let_through: list[str]
    left_out: int
    verdict: str
    clear: bool
    """Whether the interval leaves 0 out."""
    line: str


class Cell(NamedTuple):
    """One objective on one side."""

    text: str
    """Conversations that reached it / those scored."""
    share: float
    """0 where none was scored."""
    unscored: int


class Talks(NamedTuple):
    """What the table of objectives and the viewer show."""

    objectives: list[tuple[str, str, list[Cell]]]
    """Id, text, and a cell for each side."""
    payload: dict[str, Any]
    """For the script."""
    left_out: int
    """Turns whose objective, seed or spec the report does not know."""


def render(
    report: AttackReport, turns: Sequence[Turn], objectives: Mapping[str, str], run: Run, ends: Sequence[End] = ()
) -> str:
    """The whole page as HTML text.

    `turns`: of all conversations, in any mixture; those of one conversation are put in order by their number.
    `objectives`: their texts by id, in the order in which they are shown. A conversation of which there is no turn is
    shown as such and is unscored, as is one whose attacker was not understood. `ends`: why conversations ended early.
    """
    scripts = {"plotly": get_plotlyjs(), "page": asset("page.js") + asset("attack.js")}
    found = _talks(report, turns, objectives, ends)
    plot = rates(report)
    plots = {} if plot is None else {"rates": plot}
    total = sum(report.seconds.values())
    html = (
        environment()
        .get_template("attack.html.jinja")
        .render(
            run=run,
            report=report,
            headline=[line.replace(" %", "\u00a0%") for line in alone(report)],
            notes=[printable(note) for note in report.notes],
            sides=[side_row(side) for side in report.sides],
            contrasts=contrast_rows(report),
            talks=found,
            kinds=found.payload["kinds"],
            many=len(found.objectives) > _MANY,
            side_meanings=_meanings(AttackSide, _SIDE_MEANINGS),
            contrast_meanings=_meanings(AttackContrast, _CONTRAST_MEANINGS),
            setting=_setting(report),
            figures=plots,
            height=plot.layout.height if plot is not None else 0,
            ranking=None,
            more_facts=[],
            steps=steps(report.seconds, total),
            total_seconds=total if report.seconds else None,
            config=flat(run.config),
            csp=policy(scripts.values()),
            css=Markup(asset("study.css") + asset("comparison.css") + asset("attack.css")),
            scripts={name: Markup(text) for name, text in scripts.items()},
            figure_json=embed({name: each.to_plotly_json() for name, each in plots.items()}),
            talk_json=embed(found.payload),
        )
    )
    return writable(html)


def as_rate(share: Estimate) -> Rate:
    """A share of conversations or objectives with its counts; the interval stays as it is."""
    if not share.n or not isfinite(share.value):
        return Rate(0, 0, share.low, share.high)
    return Rate(round(share.value * share.n), share.n, share.low, share.high)


def side_row(side: AttackSide) -> SideRow:
    """`side` in words."""
    return SideRow(
        name=printable(side.label),
        success=as_rate(side.success),
        objectives=as_rate(side.objectives),
        unscored=side.unscored,
        turns_to_success=words.number(side.turns_to_success),
        turns=words.number(side.turns),
        backtracks=words.number(side.backtracks),
        refused=side.refused,
        degenerate=side.degenerate,
    )


def contrast_rows(report: AttackReport) -> list[ContrastRow]:
    """The contrasts of `report` in words."""
    labels = [side.label for side in report.sides]
    return [
        ContrastRow(
            base=printable(one.base),
            steered=printable(one.steered),
            place=labels.index(one.steered, 1) if one.steered in labels[1:] else 0,
            difference=_points(one.difference.value),
            interval=_interval(one.difference),
            n=one.difference.n,
            p_holm=words.p_cell(one.p_holm),
            p=words.p_cell(one.p),
            p_conversations=words.p_cell(one.p_conversations),
            clusters=one.clusters,
            stopped=[printable(name) for name in one.stopped],
            let_through=[printable(name) for name in one.let_through],
            left_out=one.left_out,
            verdict=one.verdict,
            clear=one.difference.low > 0 or one.difference.high < 0,
            line=printable(one.line),
        )
        for one in report.contrasts
    ]


def alone(report: AttackReport) -> list[str]:
    """What to say first where nothing was compared: the rate of every side, a sentence each."""
    if report.contrasts:
        return []
    said = [
        f"{printable(side.label)}: {words.rate_text(as_rate(side.success))} of conversations reached their objective."
        for side in report.sides
    ]
    return [*said, "Nothing was compared."]


def rates(report: AttackReport) -> go.Figure | None:
    """Conversations and, below them, objectives that were reached, in percent with intervals, a row for each side."""
    shares = {
        "conversations": [as_rate(side.success) for side in report.sides],
        "objectives": [as_rate(side.objectives) for side in report.sides],
    }
    if not any(rate.n for some in shares.values() for rate in some):
        return None
    figure = figures.canvas(84 + 62 * len(report.sides), "")
    names = [_cut(printable(side.label)) for side in report.sides]
    for what, role, symbol, below in _MARKS:
        kept = [(-place + below, names[place], rate) for place, rate in enumerate(shares[what]) if rate.n]
        figure.add_scatter(
            x=[100 * rate.value for _, _, rate in kept],
            y=[y for y, _, _ in kept],
            error_x=figures.whiskers([rate for _, _, rate in kept], 1.5),
            mode="markers",
            marker={"size": 10, "symbol": symbol},
            hovertext=[f"{name}<br>{what} {words.rate_text(rate)}" for _, name, rate in kept],
            hoverinfo="text",
            meta={"role": role},
        )
    for place, name in enumerate(names):
        figure.add_annotation(
            text=name, x=0, xref="paper", xanchor="left", y=-place, yshift=17, showarrow=False
        )  # fmt: skip
    figure.update_yaxes(range=[0.45 - len(names), 0.6], showticklabels=False, showgrid=False, ticks="")
    figure.update_xaxes(range=[-3, 103], title_text="reached their objective, %")
    return figure


def _cut(name: str) -> str:
    """A name that a figure shows as text, never as markup."""
    return escape(name if len(name) <= _NAME else f"{name[: _NAME - 1]}…", quote=False)


def _points(x: float) -> str:
    return f"{100 * x:+.1f}" if isfinite(x) else words.NA


def _interval(one: Estimate) -> str:
    if not (isfinite(one.low) and isfinite(one.high)):
        return ""
    return f"[{100 * one.low:.1f}, {100 * one.high:.1f}]"


def _meanings(cls: type, headings: Mapping[str, str]) -> list[tuple[str, str]]:
    docs = words.field_docs(cls)
    return [(name, docs[field].replace("NaN", words.NA)) for name, field in headings.items() if field in docs]


def _setting(report: AttackReport) -> list[tuple[str, str]]:
    facts = [
        ("Model", report.model),
        ("Attacker", report.attacker),
        ("Judge of refusals", report.refusal_judge),
        ("Judge of success", report.success_judge),
        ("Sides", ", ".join(f"{side.label} ({side.spec})" for side in report.sides)),
        ("Conversations on each side", f"{report.objectives} objectives x {report.seeds} seeds"),
        ("Turns at most", str(report.max_turns)),
        ("Taken back at most", f"{report.max_backtracks} turns"),
    ]
    return [(name, printable(value)) for name, value in facts]


def _talks(report: AttackReport, turns: Sequence[Turn], objectives: Mapping[str, str], ends: Sequence[End]) -> Talks:
    """Every conversation on every side."""
    why = {(end.objective, end.seed, end.spec): end.why for end in ends}
    place = {side.spec: number for number, side in reversed(list(enumerate(report.sides)))}
    by_key: dict[tuple[str, int, int], list[Turn]] = defaultdict(list)
    left_out = 0
    for turn in turns:
        if turn.objective in objectives and 0 <= turn.seed < report.seeds and turn.spec in place:
            by_key[turn.objective, turn.seed, place[turn.spec]].append(turn)
        else:
            left_out += 1
    several = len(report.sides) > 1
    rows: list[dict[str, Any]] = []
    table: list[tuple[str, str, list[Cell]]] = []
    for ident, text in objectives.items():
        outcomes: list[list[bool | None]] = [[] for _ in report.sides]
        for seed in range(report.seeds):
            said = []
            for number in range(len(report.sides)):
                mine = sorted(by_key[ident, seed, number], key=lambda turn: turn.number)
                reason = why.get((ident, seed, report.sides[number].spec), "")
                said.append(_talk(mine, report.max_turns, reason))
                outcomes[number].append(said[-1]["outcome"])
            rows.append({"objective": len(table), "seed": seed, "sides": said})
        table.append((printable(ident), printable(text), [_cell(some) for some in outcomes]))
    payload = {
        "sides": [printable(side.label) for side in report.sides],
        "kinds": _PAIRED if several else _ALONE,
        "objectives": [[ident, text] for ident, text, _ in table],
        "talks": rows if report.sides else [],
    }
    return Talks(table, payload, left_out)


def _cell(outcomes: Sequence[bool | None]) -> Cell:
    scored = [found for found in outcomes if found is not None]
    text = f"{sum(scored)}/{len(scored)}" if scored else words.NA
    return Cell(text, sum(scored) / max(1, len(scored)), len(outcomes) - len(scored))


def _talk(turns: Sequence[Turn], max_turns: int, why: str) -> dict[str, Any]:
    """One conversation; what became of it is told as `demur.eval.attacks` counts it."""
    kept = [turn for turn in turns if not turn.taken_back]
    outcome: bool | None = any(turn.success for turn in turns)
    if not outcome and (not turns or why == "not understood" or any(turn.success is None for turn in kept)):
        outcome = None
    back = len(turns) - len(kept)
    told = f"{_OUTCOMES[outcome]}: {words.count(len(kept), 'turn')}" + (f", {back} taken back" if back else "")
    if not outcome:
        told += ", the most there may be" if len(kept) >= max_turns else _WHY.get(why, ", then nothing more was asked")
    return {
        "outcome": outcome,
        "told": told if turns else "no turn was asked",
        "turns": [
            {
                "user": turn.user,
                "reply": turn.reply,
                "tokens": turn.tokens,
                "label": turn.label,
                "success": turn.success,
                "back": turn.taken_back,
                "evidence": printable(turn.evidence),
            }
            for turn in turns
        ],
    }
