"""Show what a verb returned: tables for people on stderr, one JSON object on stdout if asked."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from demur.record import to_json
from demur.types import StudyResult


def show_json(value: Any) -> None:
    """One JSON object on stdout; numbers that are not (NaN) become null."""
    print(json.dumps(_strict(value), ensure_ascii=False, allow_nan=False))


def show_study(result: StudyResult, as_json: bool) -> None:
    """The study's table, its verdict and where the report is."""
    from rich.console import Console

    from demur.report.table import table, verdict_line

    console = Console(stderr=True)
    console.print(table(result))
    console.print(verdict_line(result), highlight=False)
    for note in result.notes:
        console.print(f"Note: {note}", highlight=False)
    print(f"report: {result.report}", file=sys.stderr)
    if as_json:
        show_json(to_json(result))


def show_sae(result: dict[str, Any], as_json: bool) -> None:
    """The measures of an SAE."""
    for name, value in result["metrics"].items():
        print(f"  {name:18} {value:,.4f}", file=sys.stderr)
    if as_json:
        show_json({**result["metrics"], **result})


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return value
