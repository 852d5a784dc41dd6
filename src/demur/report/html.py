"""A study as one HTML file that opens anywhere, offline, and loads nothing.

Model text is untrusted. It enters the page only as JSON with every `<`, `>` and `&` escaped, and the script
puts it on screen as text, never as markup. A content security policy forbids all connections and all scripts
but ours.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from demur.report import control, figures, words
from demur.report.discovery import section
from demur.report.page import asset, candidates, embed, environment, flat, policy, steps, writable
from demur.report.table import headline, verdict_line
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
        "page": asset("page.js") + asset("study.js"),
    }
    talks = _transcripts(result, prompts, completions, verdicts)
    plots = figures.build(result)
    found = section(discovery) if discovery else None
    if found:
        plots.pop("candidates", None)
        plots |= found.figures
    judges = sorted({verdict.judge for verdict in verdicts})
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
            judges=judges,
            ranking=result.ranking,
            more_facts=[("Judge", ", ".join(judges))],
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


class Transcripts(NamedTuple):
    """What the side-by-side viewer needs."""

    payload: dict[str, Any]
    """Specs, prompts and outputs, for the script."""
    system: str
    """The system turn that every conversation starts with; empty when they differ."""
    left_out: int
    """Completions whose prompt or spec the report does not know."""


def _transcripts(
    result: StudyResult,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
) -> Transcripts:
    specs = [
        {
            "spec": row.spec,
            "label": f"clamp {words.number(row.value)} (latent {latent})",
            "kind": kind,
            "best": kind == "steered" and row.value == result.best_value,
        }
        for kind, latent, rows in (
            ("steered", result.latent, result.rows),
            ("control", result.control_latent, result.control_rows),
        )
        for row in rows
        if row.spec != UNSTEERED
    ]
    judged = {(verdict.prompt, verdict.spec): verdict for verdict in verdicts}
    outputs: dict[str, dict[str, Any]] = {str(item["spec"]): {} for item in specs}
    outputs[UNSTEERED] = {}
    known = {prompt.id for prompt in prompts}
    left_out = 0
    for item in completions:
        if item.spec not in outputs or item.prompt not in known:
            left_out += 1
            continue
        verdict = judged.get((item.prompt, item.spec))
        outputs[item.spec][item.prompt] = {
            "text": item.text,
            "tokens": item.tokens,
            "stop": item.stop,
            "label": verdict.label if verdict else "unscored",
            "judge": verdict.judge if verdict else "",
            "evidence": verdict.evidence if verdict else "no verdict was recorded",
        }
    spoken = {prompt for texts in outputs.values() for prompt in texts}
    shown = [prompt for prompt in prompts if prompt.id in spoken]
    system = _shared_system(shown)
    payload = {
        "unsteered": UNSTEERED,
        "sets": SETS,
        "specs": specs,
        "prompts": [
            {
                "id": prompt.id,
                "set": _set_of(prompt),
                "category": prompt.category,
                "twin": prompt.twin,
                "text": prompt.text,
                "earlier": [[turn.role, turn.content] for turn in prompt.messages[bool(system) : -1]],
            }
            for prompt in shown
        ],
        "outputs": outputs,
    }
    return Transcripts(payload, system, left_out)


def _set_of(prompt: Prompt) -> str:
    if prompt.intent == "harmful":
        return "harmful"
    return "lookalike" if prompt.twin or "lookalike" in prompt.source.replace("-", "").lower() else "plain"


def _shared_system(prompts: Sequence[Prompt]) -> str:
    first = {turn.content if (turn := prompt.messages[0]).role == "system" else "" for prompt in prompts}
    return first.pop() if len(first) == 1 else ""


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
