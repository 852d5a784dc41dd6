"""What the server counts, in Prometheus's format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """Counters of one server; the label `spec` is a spec's name, `unsteered` or `inline`."""

    def __init__(self) -> None:
        self._all = CollectorRegistry()
        own: Any = {"registry": self._all, "namespace": "demur"}
        self._requests = Counter("requests", "Requests by path and HTTP status.", ("path", "status"), **own)
        self._answers = Counter(
            "answers", "Answers by spec, and whether they came to an end.", ("spec", "ended"), **own
        )
        self._written = Counter("tokens_written", "Tokens written, by spec.", ("spec",), **own)
        self._steered = Counter("tokens_steered", "Tokens on which an edit was in force, by spec.", ("spec",), **own)
        self._gates = Counter(
            "gates", "Answers under a spec with a gate, by whether the gate opened.", ("spec", "opened"), **own
        )
        self._first = Histogram("first_token_seconds", "From the request to its first token.", ("spec",), **own)
        self._running = Gauge("answers_running", "Answers being written.", **own)
        self._waiting = Gauge("answers_waiting", "Answers that wait.", **own)

    def follow(self, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        """Ask these for the gauges."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)

    def request(self, path: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(path, str(status)).inc()

    def first(self, spec: str, seconds: float) -> None:
        """The first token of an answer came after `seconds`."""
        self._first.labels(spec).observe(seconds)

    def answer(self, spec: str, written: int, steered: int, gated: bool, ended: bool) -> None:
        """An answer has left the batch."""
        self._answers.labels(spec, "yes" if ended else "no").inc()
        self._written.labels(spec).inc(written)
        self._steered.labels(spec).inc(steered)
        if gated:
            self._gates.labels(spec, "yes" if steered else "no").inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._all)
