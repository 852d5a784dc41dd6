"""Progress for people, on stderr: a bar with an estimate on a terminal, a line now and then elsewhere.

Silent unless `shown()` is in force, so that demur as a library prints nothing. rich draws the bars.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_visible: ContextVar[bool] = ContextVar("demur_progress", default=False)
_LINE_EVERY = 10.0
"""Seconds between plain progress lines when stderr is no terminal."""
_INSTANT = 1e-3


@contextmanager
def shown(visible: bool = True) -> Iterator[None]:
    """Show messages and progress inside the block."""
    token = _visible.set(visible)
    try:
        yield
    finally:
        _visible.reset(token)


def say(text: str) -> None:
    """One line for people."""
    if _visible.get():
        print(text, file=sys.stderr, flush=True)


@contextmanager
def track(
    what: str, total: float, unit: str = "", note: Callable[[], str] = lambda: ""
) -> Iterator[Callable[[float], None]]:
    """Progress of `what` towards `total`; the block calls the yielded function with each amount done.

    `note`: what else to show, asked for each time; for instance a running rate.
    """
    if not _visible.get() or total <= 0:
        yield lambda amount: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total, note="")
            yield lambda amount: bar.update(task, advance=amount, note=note())
    else:
        yield _lines(what, total, unit, note)


def _lines(what: str, total: float, unit: str, note: Callable[[], str]) -> Callable[[float], None]:
    start = last = before = time.monotonic()
    done = worked = 0.0

    def advance(amount: float) -> None:
        nonlocal done, worked, last, before
        now = time.monotonic()
        done += amount
        if now - before > _INSTANT:  # what took no time was there from an earlier run, and says nothing of the rest
            worked += amount
        before = now
        if now - last >= _LINE_EVERY and worked > 0:
            last = now
            left = (now - start) / worked * (total - done)
            more = f"; {said}" if (said := note()) else ""
            print(
                f"  {what}: {done:,.0f}/{total:,.0f} {unit} about {left:.0f} s left{more}",
                file=sys.stderr,
                flush=True,
            )

    return advance
