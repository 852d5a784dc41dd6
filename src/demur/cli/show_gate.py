"""Show what `demur gate train` made."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from demur.cli.show import show_json
from demur.record import to_json

if TYPE_CHECKING:
    from demur.types import Estimate
    from demur.verbs.gate_train import TrainedGate


def show_gate(found: TrainedGate, as_json: bool) -> None:
    """How well the probe tells prompts apart out of fold, how often the gate opens on test prompts, and the files."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"gate {found.hash}: opens above {found.gate.threshold:.3f} at {found.gate.hookpoint}")
    for name in ("prompts", "gate opens [95 %]", "AUROC of harmful against them"):
        table.add_column(name, justify="left" if name == "prompts" else "right")
    table.add_row("out of fold: harmful", _percent(found.caught), "")
    for kind, alarms in found.alarms.items():
        a = found.auroc[kind]
        table.add_row(f"out of fold: {kind}", _percent(alarms), f"{a.value:.3f} [{a.low:.3f}, {a.high:.3f}]")
    for one in found.opens:
        later = f"; later, in the answer: {_percent(one.monitored)}" if one.monitored else ""
        table.add_row(escape(f"test: {one.suite}, {one.intent}"), _percent(one.share) + later, "")
    console = Console(stderr=True)
    console.print(table)
    if len(found.tried) > 1:
        tried = ", ".join(f"{one.hookpoint} {one.pool} {one.auroc:.3f}" for one in found.tried)
        console.print(f"AUROC out of fold by place: {tried}", highlight=False, markup=False)
    for what, path in (("probe", found.probe), ("gated spec", found.spec)):
        if path:
            print(f"{what}: {path}", file=sys.stderr)
    if as_json:
        show_json(to_json(found))


def _percent(one: Estimate) -> str:
    return f"{100 * one.value:.1f} % [{100 * one.low:.1f}, {100 * one.high:.1f}] of {one.n}"
