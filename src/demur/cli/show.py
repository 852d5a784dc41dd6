"""Show what a verb returned: tables for people on stderr, one JSON object on stdout if asked."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from demur.record import to_json
from demur.types import StudyResult

if TYPE_CHECKING:
    from demur.verbs.export import Exported
    from demur.verbs.generate import Reply
    from demur.verbs.verify import Verified


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


def show_answers(answers: Sequence[Reply], as_json: bool) -> None:
    """The answers of `generate` as one object, under the spec of the last; for people they were streamed already."""
    if as_json:
        rows = [{key: value for key, value in to_json(answer).items() if key != "model"} for answer in answers]
        show_json({"model": answers[0].model, "spec": answers[-1].spec, "answers": rows})


def show_export(exported: Exported, as_json: bool) -> None:
    """What the export was allowed for, what to know about the file, and where it is."""
    before, after = exported.refused_before, exported.refused_after
    print(
        f"harmful prompts refused: {before.k} of {before.n} without the spec, {after.k} of {after.n} with it",
        file=sys.stderr,
    )
    for note in exported.notes:
        print(f"Note: {note}", file=sys.stderr)
    print(f"{exported.format} file: {exported.path}", file=sys.stderr)
    if as_json:
        show_json(to_json(exported))


def show_checks(verified: Verified, as_json: bool) -> None:
    """Each check with what was measured, and the verdict."""
    for check in verified.checks:
        print(f"  {'passed' if check.passed else 'FAILED'}  {check.name}: {check.measured}", file=sys.stderr)
    verdict = "is applied as it says" if verified.passed else "is NOT applied as it says"
    print(f"the spec {verified.spec} {verdict} on {verified.model}", file=sys.stderr)
    if as_json:
        show_json(to_json(verified))


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return value
