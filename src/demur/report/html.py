"""A study as one HTML file that opens anywhere, offline, and loads nothing.

Model text is untrusted. It enters the page only as JSON with every `<`, `>` and `&` escaped, and the script
puts it on screen as text, never as markup. A content security policy forbids all connections and all scripts
but ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from demur.report import control, figures, words
from demur.report.discovery import section
from demur.report.page import asset, candidates, embed, environment, flat, policy, steps, writable
from demur.report.table import headline, verdict_line
from demur.report.transcripts import Judged, Spoken, Transcripts, viewer
from demur.types import UNSTEERED, Completion, Discovery, Prompt, Run, StudyResult, StudyRow, Verdict

SETS = {"harmful": "harmful", "plain": "plain benign", "lookalike": "look-alike"}
"""Key and words of the three prompt sets."""


def render(
    result: StudyResult,
    run: Run,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    discovery: Discovery | None = None,
) -> str:
    """The whole report as HTML text.

    `completions` and `verdicts` may come from any split and spec; those without a prompt in `prompts` or a
    row in `result` are counted and left out. A completion without a verdict is shown as unscored. With a
    `discovery`, how the latent was found stands in place of the candidates.
    """
    scripts = {
        "plotly": get_plotlyjs(),
        "page": asset("page.js") + asset("transcripts.js") + asset("study.js"),
    }
    talks = _transcripts(result, prompts, completions, verdicts)
    plots = figures.build(result)
    found = section(discovery) if discovery else None
    if found:
        plots.pop("candidates", None)
        plots |= found.figures
    html = (
        environment()
        .get_template("study.html.jinja")
        .render(
            result=result,
            run=run,
            verdict=verdict_line(result).replace(" %", "\u00a0%"),
            pair=headline(result),
            rows=_rows(result),
            measures=figures.MEASURES,
            figures=plots,
            kl_is_log=figures.kl_is_log(result),
            docs=words.field_docs(StudyRow),
            best_doc=words.field_docs(StudyResult).get("best_value", ""),
            discovery=discovery,
            found=found,
            alone=False,
            candidates=candidates(result.ranking, {result.control_latent: "control", result.latent: "chosen"}),
            comparisons=list(control.comparisons(result)),
            talks=talks,
            ranking=result.ranking,
            more_facts=[("Judge", ", ".join(talks.judges))],
            steps=steps(result.step_seconds, result.seconds),
            total_seconds=result.seconds,
            config=flat(run.config),
            csp=policy(scripts.values()),
            css=Markup(asset("study.css")),
            scripts={name: Markup(text) for name, text in scripts.items()},
            figure_json=embed(plots),
            talk_json=embed(talks.payload),
        )
    )
    return writable(html)


def _transcripts(
    result: StudyResult,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
) -> Transcripts:
    """The unsteered model beside every value of the latent and of the control."""
    judged = Judged(verdicts, verdicts[-1].judge if verdicts else "")
    base = Spoken(UNSTEERED, UNSTEERED, "", {})
    others = [
        Spoken(
            row.spec,
            f"{kind}, clamp {words.number(row.value)} (latent {latent})",
            kind,
            {},
            kind == "steered" and row.value == result.best_value,
        )
        for kind, latent, rows in (
            ("steered", result.latent, result.rows),
            ("control", result.control_latent, result.control_rows),
        )
        for row in rows
        if row.spec != UNSTEERED
    ]
    sides = {side.key: side for side in (base, *others)}
    known = {prompt.id for prompt in prompts}
    left_out = 0
    for item in completions:
        if item.spec not in sides or item.prompt not in known:
            left_out += 1
            continue
        sides[item.spec].answers[item.prompt] = judged.answer(item)
    facets = {"set": "Set", "category": "Category"}
    return viewer(prompts, base, others, SETS, _set_of, facets, judged.judges, left_out)


def _set_of(prompt: Prompt) -> str:
    if prompt.intent == "harmful":
        return "harmful"
    return "lookalike" if prompt.twin or "lookalike" in prompt.source.replace("-", "").lower() else "plain"


class Group(NamedTuple):
    """A block of rows in the table."""

    kind: str
    title: str
    rows: list[StudyRow]


def _rows(result: StudyResult) -> list[Group]:
    steered = [row for row in result.rows if row.spec != UNSTEERED]
    start = [row for row in result.rows if row.spec == UNSTEERED]
    groups = [
        Group("unsteered", "Unsteered model", start),
        Group("steered", f"Steered: latent {result.latent}", steered),
        Group("control", f"Control: latent {result.control_latent}", list(result.control_rows)),
    ]
    return [group for group in groups if group.rows]
