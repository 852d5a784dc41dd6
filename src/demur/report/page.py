"""What the pages share: templates, and how untrusted text enters a page that loads nothing.

Model text is untrusted. It enters a page through jinja's escaping, or as JSON with every `<`, `>` and `&` escaped, and
scripts put it on screen as text, never as markup. A content security policy forbids all connections and all scripts
but ours.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from demur.report import words
from demur.types import UNSTEERED, LatentRanking


def environment() -> Environment:
    """The templates, with escaping on and the filters that turn measurements into words."""
    made = Environment(
        loader=PackageLoader("demur.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": words.number,
        "percent": words.percent,
        "rate_parts": words.rate_parts,
        "rate_short": words.rate_short,
        "duration": words.duration,
        "share": words.share,
        "code": _code,
    }
    made.globals["span_parts"] = words.span_parts
    made.globals["unsteered"] = UNSTEERED
    return made


def _code(text: str) -> Markup:
    """Escaped text with `backticks` as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def asset(name: str) -> str:
    """The text of a file that stands beside the templates."""
    return (resources.files("demur.report") / "templates" / name).read_text(encoding="utf-8")


def policy(scripts: Iterable[str]) -> str:
    """No connection anywhere; of scripts, only those whose text hashes to what is listed here."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def embed(value: Any) -> Markup:
    """JSON that is safe inside `<script>`: NaN is null and nothing in it can end the element."""
    text = json.dumps(_gaps(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def writable(html: str) -> str:
    """`html` that can be written as UTF-8: no lone surrogate may stop the write to disk."""
    return html.encode("utf-8", "replace").decode("utf-8")


class Candidates(NamedTuple):
    """A ranking as a table."""

    columns: list[str]
    """Keys of `LatentScore.detail`, as first met."""
    rows: list[tuple[int, str, str, list[str]]]
    """Latent, mark, score, details; a missing detail is blank."""


def candidates(ranking: LatentRanking, marks: Mapping[int | None, str]) -> Candidates:
    """All latents of `ranking`; `marks` says in a word what became of some."""
    columns = list(dict.fromkeys(key for item in ranking.scores for key in item.detail))
    rows = [
        (
            item.latent,
            marks.get(item.latent, ""),
            words.number(item.score, 4),
            [words.number(item.detail[key], 4) if key in item.detail else "" for key in columns],
        )
        for item in ranking.scores
    ]
    return Candidates(columns, rows)


def steps(seconds: Mapping[str, float], total: float) -> list[tuple[str, str, str]]:
    """Each step with its time and its share of `total`."""
    return [
        (name, words.duration(taken), f"{100 * taken / total:.0f} %" if total > 0 else words.NA)
        for name, taken in seconds.items()
    ]


def flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested config as dotted names and texts."""
    found: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found += flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            found.append((f"{prefix}{key}", text))
    return found


def _gaps(value: Any) -> Any:
    """The same JSON value with None for NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _gaps(item) for key, item in value.items()}
    return [_gaps(item) for item in value] if isinstance(value, list | tuple) else value
