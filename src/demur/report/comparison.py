"""A comparison as one HTML file that opens anywhere, offline, and loads nothing: see `demur.report.page`."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from demur.report import figures, words
from demur.report.compare_table import blocks, foot, side_names
from demur.report.escape import printable
from demur.report.page import asset, embed, environment, flat, policy, writable
from demur.report.transcripts import Judged, Spoken, Transcripts, viewer
from demur.results import Comparison, Contrast, Side
from demur.types import Completion, Prompt, Run, Verdict

_FACETS = {"set": "Intent", "suite": "Suite", "category": "Category", "wrapper": "Wrapper"}
_MARKS = {
    "better": ("steered", "circle"),
    "worse": ("control", "diamond"),
    "kept": ("other", "square"),
    "open": ("other", "circle-open"),
}
"""Colour and shape of each verdict; the marks in `comparison.css` are the same."""
_MEANINGS = {
    "Difference": "difference",
    "p": "p",
    "p, Holm": "p_holm",
    "Shown from": "detectable",
    "Kept": "kept",
    "Verdict": "verdict",
}
"""Heading and field of a contrast."""
_NAME = 46
"""Characters of a name that fit over its line in the narrowest figure."""


class Talk(NamedTuple):
    """What one side said, and everything else in its run folder: the rest is left aside."""

    side: Side
    prompts: list[Prompt]
    completions: list[Completion]
    verdicts: list[Verdict]
    """Of all judges."""


def render(comparisons: Sequence[Comparison], talks: Sequence[Talk], run: Run, notes: Sequence[str], judge: str) -> str:
    """The whole page as HTML text.

    `talks`: the base first; they may be of runs with other prompts, and an answer that is missing is shown as such.
    `run`: provenance of the base. `judge`: whose labels count; those of others stand beside them.
    """
    scripts = {"plotly": get_plotlyjs(), "page": asset("page.js") + asset("transcripts.js")}
    transcripts = _transcripts(talks, comparisons, judge)
    plots = {f"forest-{i}": plot for i, one in enumerate(comparisons) if (plot := forest(one)) is not None}
    docs = words.field_docs(Contrast)
    html = (
        environment()
        .get_template("comparison.html.jinja")
        .render(
            run=run,
            blocks=blocks(comparisons),
            notes=[printable(note) for note in notes],
            foot=foot(comparisons, "Dim: the interval holds 0."),
            verdicts=list(_MARKS),
            meanings=[(name, docs.get(field, "").replace("NaN", words.NA)) for name, field in _MEANINGS.items()],
            figures=plots,
            heights={name: plot.layout.height for name, plot in plots.items()},
            talks=transcripts,
            ranking=None,
            more_facts=[("Judge", judge), ("All judges", ", ".join(transcripts.judges))],
            steps=[],
            total_seconds=None,
            config=flat(run.config),
            csp=policy(scripts.values()),
            css=Markup(asset("study.css") + asset("comparison.css")),
            scripts={name: Markup(text) for name, text in scripts.items()},
            figure_json=embed({name: plot.to_plotly_json() for name, plot in plots.items()}),
            talk_json=embed(transcripts.payload),
        )
    )
    return writable(html)


def forest(one: Comparison) -> go.Figure | None:
    """The difference of each contrast in points with its interval; None where none was measured.

    Other metrics than shares have no place on the axis, and are in the table only. For tasks the margin is marked.
    """
    rows = [each for each in one.contrasts if each.unit == "share" and words.finite(each.difference.value) is not None]
    if not rows:
        return None
    figure = figures.canvas(70 + 46 * len(rows), "")
    for verdict, (role, symbol) in _MARKS.items():
        at = [(-place, each) for place, each in enumerate(rows) if each.verdict == verdict]
        figure.add_scatter(
            x=[100 * each.difference.value for _, each in at],
            y=[y for y, _ in at],
            error_x=figures.whiskers([each.difference for _, each in at], 1.5),
            mode="markers",
            marker={"size": 10, "symbol": symbol},
            hovertext=[escape(printable(each.line), quote=False).replace(": ", ":<br>", 1) for _, each in at],
            hoverinfo="text",
            meta={"role": role},
        )
    tasks = [-place for place, each in enumerate(rows) if each.kept is not None]
    figure.add_scatter(
        x=[-100 * one.margin] * len(tasks),
        y=tasks,
        mode="markers",
        marker={"size": 16, "symbol": "line-ns-open"},
        hovertext=[f"margin: a loss of {100 * one.margin:g} points"] * len(tasks),
        hoverinfo="text",
        meta={"role": "other"},
    )
    for place, each in enumerate(rows):
        figure.add_annotation(
            text=escape(_name(each), quote=False),
            x=0,
            xref="paper",
            xanchor="left",
            y=-place,
            yshift=16,
            showarrow=False,
        )
    figure.update_yaxes(range=[0.6 - len(rows), 0.8], showticklabels=False, showgrid=False, ticks="")
    figure.update_xaxes(title_text="steered minus base, points", zeroline=True, zerolinecolor="#7d8690")
    return figure


def _name(one: Contrast) -> str:
    text = printable(one.what)
    cut = text if len(text) <= _NAME else f"{text[: _NAME - 1]}…"
    return f"{'↑' if one.better == 'more' else '↓'} {cut}"


def _transcripts(talks: Sequence[Talk], comparisons: Sequence[Comparison], judge: str) -> Transcripts:
    """Sides are told apart by their place: two runs have an unsteered side of the same spec."""
    named = side_names(side for one in comparisons for side in (one.base, one.steered))
    called = {(side.spec, side.run): name for side, name in named.items()}
    prompts: dict[str, Prompt] = {}
    judges = [judge] if judge else []
    spoken, left_out = [], 0
    for place, talk in enumerate(talks):
        known = {prompt.id for prompt in talk.prompts}
        for prompt in talk.prompts:
            prompts.setdefault(prompt.id, prompt)
        judged = Judged([one for one in talk.verdicts if one.spec == talk.side.spec], judge)
        said = [one for one in talk.completions if one.spec == talk.side.spec]
        answers = {one.prompt: judged.answer(one) for one in said if one.prompt in known}
        left_out += sum(one.prompt not in known for one in said)
        name = called.get((talk.side.spec, talk.side.run)) or printable(talk.side.label)
        spoken.append(Spoken(str(place), name, "sides", answers, place == 1))
        judges += judged.judges
    base, *others = spoken or [Spoken("0", "base", "sides", {})]
    sets = {"harmful": "harmful", "benign": "benign"}
    return viewer(
        list(prompts.values()),
        base,
        others,
        sets,
        lambda prompt: prompt.intent,
        _FACETS,
        list(dict.fromkeys(judges)),
        left_out,
    )
