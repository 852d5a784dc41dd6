"""A study as one HTML file that opens anywhere, offline, and loads nothing.

Model text is untrusted. It enters the page only as JSON with every `<`, `>` and `&` escaped, and the script
puts it on screen as text, never as markup. A content security policy forbids all connections and all scripts
but ours.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from demur.report import control, figures, words
from demur.report.table import headline, verdict_line
from demur.types import UNSTEERED, Completion, Prompt, Run, StudyResult, StudyRow, Verdict

SETS = {"harmful": "harmful", "plain": "plain benign", "lookalike": "look-alike"}
"""Key and words of the three prompt sets."""


def render(
    result: StudyResult,
    run: Run,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
) -> str:
    """The whole report as HTML text.

    `completions` and `verdicts` may come from any split and spec; those without a prompt in `prompts` or a
    row in `result` are counted and left out. A completion without a verdict is shown as unscored.
    """
    scripts = {
        "plotly": get_plotlyjs(),
        "page": _asset("study.js"),
    }
    talks = _transcripts(result, prompts, completions, verdicts)
    html = (
        _environment()
        .get_template("study.html.jinja")
        .render(
            result=result,
            run=run,
            verdict=verdict_line(result).replace(" %", "\u00a0%"),
            pair=headline(result),
            rows=_rows(result),
            measures=figures.MEASURES,
            figures=(plots := figures.build(result)),
            kl_is_log=figures.kl_is_log(result),
            docs=words.field_docs(StudyRow),
            best_doc=words.field_docs(StudyResult).get("best_value", ""),
            candidates=_candidates(result),
            comparisons=list(control.comparisons(result)),
            talks=talks,
            judges=sorted({verdict.judge for verdict in verdicts}),
            steps=_steps(result),
            config=_flat(run.config),
            csp=_policy(scripts.values()),
            css=Markup(_asset("study.css")),
            scripts={name: Markup(text) for name, text in scripts.items()},
            figure_json=_embed(plots),
            talk_json=_embed(talks.payload),
        )
    )
    return html.encode("utf-8", "replace").decode("utf-8")  # no lone surrogate may stop the write to disk


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


class Candidates(NamedTuple):
    """The ranking as a table."""

    columns: list[str]
    """Keys of `LatentScore.detail`, as first met."""
    rows: list[tuple[int, str, str, list[str]]]
    """Latent, mark, score, details; a missing detail is blank."""


def _candidates(result: StudyResult) -> Candidates:
    columns = list(dict.fromkeys(key for item in result.ranking.scores for key in item.detail))
    marks = {result.control_latent: "control", result.latent: "chosen"}
    rows = [
        (
            item.latent,
            marks.get(item.latent, ""),
            words.number(item.score, 4),
            [words.number(item.detail[key], 4) if key in item.detail else "" for key in columns],
        )
        for item in result.ranking.scores
    ]
    return Candidates(columns, rows)


def _steps(result: StudyResult) -> list[tuple[str, str, str]]:
    total = result.seconds
    return [
        (name, words.duration(seconds), f"{100 * seconds / total:.0f} %" if total > 0 else words.NA)
        for name, seconds in result.step_seconds.items()
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat += _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat.append((f"{prefix}{key}", text))
    return flat


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("demur.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": words.number,
        "percent": words.percent,
        "rate_parts": words.rate_parts,
        "rate_short": words.rate_short,
        "duration": words.duration,
        "code": _code,
    }
    environment.globals["span_parts"] = words.span_parts
    environment.globals["unsteered"] = UNSTEERED
    return environment


def _code(text: str) -> Markup:
    """Escaped text with `backticks` as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _asset(name: str) -> str:
    return (resources.files("demur.report") / "templates" / name).read_text(encoding="utf-8")


def _policy(scripts: Iterable[str]) -> str:
    """No connection anywhere; of scripts, only those whose text hashes to what is listed here."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _embed(value: Any) -> Markup:
    """JSON that is safe inside `<script>`: NaN is null and nothing in it can end the element."""
    text = json.dumps(_gaps(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _gaps(value: Any) -> Any:
    """The same JSON value with None for NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _gaps(item) for key, item in value.items()}
    return [_gaps(item) for item in value] if isinstance(value, list | tuple) else value
