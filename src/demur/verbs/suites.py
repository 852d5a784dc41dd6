"""`demur suites`: the prompt suites that are known, and where each would be read from."""

from __future__ import annotations

from typing import Any

from demur.data.suites import Suite, locate
from demur.data.suites import suites as known
from demur.verbs.eval_config import Suites


def suites(config: Suites) -> list[dict[str, Any]]:
    """A row for each suite; `where` says what `--data-dir` or the hub would give. Nothing is read or fetched."""
    return [
        {
            "name": suite.name,
            "title": suite.title,
            "licence": suite.licence,
            "paper": suite.paper,
            "gated": suite.gated,
            "harmful": suite.harmful,
            "benign": suite.benign,
            "note": suite.note,
            "where": _where(suite, config),
        }
        for suite in known()
    ]


def _where(suite: Suite, config: Suites) -> str:
    if not suite.parts:
        return "comes with demur"
    found = [locate(part, config.data_dir) for part in suite.parts]
    if any(found):
        missing = sum(path is None for path in found)
        return ", ".join(str(path) for path in found if path) + (f" ({missing} parts are missing)" if missing else "")
    if suite.hub:
        return f"hub: {suite.hub}" + (" (gated)" if suite.gated else "")
    return f"--data-dir with {suite.parts[0].files[0]} ({suite.homepage})"
