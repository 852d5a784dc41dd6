"""What demur adds to vLLM's `/metrics`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from demur.vllm.tally import FOLDER, read_tallies

_HELP = {
    "tokens_steered": "Tokens on which an edit was in force, by spec.",
    "requests_gated": "Requests under a spec with a gate, by spec.",
    "gates_opened": "Requests whose gate opened, by spec.",
}


class Metrics:
    """Counters of one server; the label `spec` is a spec's name, `unsteered` or `inline`."""

    def __init__(self, names: Iterable[str]) -> None:
        self._requests, self._refused, tallies = _counters()
        tallies.labels = ("unsteered", *names, "inline")

    def request(self, spec: str) -> None:
        """A request was accepted."""
        self._requests.labels(spec).inc()

    def refused(self) -> None:
        """A request was refused for its spec."""
        self._refused.inc()


class Tallies:
    """What the workers counted, read when `/metrics` is."""

    def __init__(self) -> None:
        self.labels: tuple[str, ...] = ()

    def collect(self) -> Iterable[Any]:
        """As a Prometheus collector."""
        family = import_module("prometheus_client.core").CounterMetricFamily
        folder = os.environ.get(FOLDER, "")
        for name, counts in (read_tallies(Path(folder), self.labels) if folder else {}).items():
            found = family(f"demur_{name}", _HELP[name], labels=["spec"])
            for label, count in counts.items():
                if count:
                    found.add_metric([label], count)
            yield found


@cache
def _counters() -> tuple[Any, Any, Tallies]:
    """Made once in a process, however many servers it has: Prometheus takes no name twice."""
    client = import_module("prometheus_client")
    tallies = Tallies()
    client.REGISTRY.register(tallies)
    return (
        client.Counter("demur_requests", "Requests accepted, by spec.", ("spec",)),
        client.Counter("demur_requests_refused", "Requests refused for their spec."),
        tallies,
    )
