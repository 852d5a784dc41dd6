"""The thread that runs the model: all answers in one batch, each under its own spec."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from demur import progress
from demur.errors import DemurError, InputError
from demur.lm.batches import Row
from demur.lm.continuous import Continuous, Token, Wanted
from demur.lm.load import LanguageModel
from demur.lm.sampling import Drawn, Sampling
from demur.lm.text_stream import TextStream
from demur.sae.store import LoadedSae
from demur.serve.metrics import Metrics
from demur.spec import SteeringSpec
from demur.steering.slots import Slots, Tokens, steer_slots
from demur.steering.vectors import Vector

Finish = Literal["stop", "length"]
_PREFILL = 4096
"""Tokens of new prompts, padding counted, that are run between two tokens of the answers under way."""


class Busy(Exception):
    """More answers wait than the server takes on."""


class Broken(Exception):
    """The answer ended by an error on the server's side."""


@dataclass
class Piece:
    """What came of an answer with one token."""

    text: str
    """May be empty, and differ from the token's own text."""
    drawn: Drawn
    ends_turn: bool
    """It is the end-of-turn token, which is no part of the text."""
    finish: Finish | None = None
    """Nothing more comes."""


@dataclass(eq=False)
class Job:
    """One answer: what is wanted, and where its pieces go."""

    ids: Row
    sampling: Sampling
    spec: SteeringSpec
    label: str
    """Of the spec, for metrics."""
    stops: Sequence[str]
    deadline: float
    """By `time.monotonic`."""
    pieces: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    slot: int | None = None
    text: TextStream | None = None
    arrived: float = field(default_factory=time.monotonic)
    written: int = 0
    gated: bool = False
    """A text gate has decided what `spec` is."""

    @property
    def most(self) -> int:
        """Tokens that prompt and answer may have together."""
        return len(self.ids) + self.sampling.max_new_tokens


class Engine:
    """Runs answers from its own thread between `start` and `stop`."""

    def __init__(
        self,
        lm: LanguageModel,
        saes: Sequence[LoadedSae],
        directions: Sequence[Vector],
        slots: int,
        waiting: int,
        room: int,
        keep: Sequence[SteeringSpec],
        metrics: Metrics,
    ) -> None:
        """`slots`: answers written at once. `waiting`: answers that may wait for one. `room`: tokens of all answers
        under way, each as long as the longest may get. `keep`: specs that requests will name."""
        self.lm, self._room, self._keep = lm, room, keep
        self._saes, self._directions, self._slots, self._most = saes, directions, slots, waiting
        self._metrics = metrics
        self._new: deque[Job] = deque()
        self._by_slot: dict[int, Job] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._steering: Slots | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin; pieces are handed over in `loop`."""
        self._loop = loop
        self._thread = threading.Thread(target=self._run, name="demur-engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._steering is None:
            raise Broken("the engine did not start")

    def stop(self) -> None:
        """End; answers under way are broken off."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether answers can be written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def running(self) -> int:
        """Answers being written."""
        return len(self._by_slot)

    @property
    def waiting(self) -> int:
        """Answers that wait."""
        return len(self._new)

    def check(self, spec: SteeringSpec) -> None:
        """Raise what `steer` has to say about the spec."""
        assert self._steering is not None
        self._steering.check(spec)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Write the answers of one request.

        Raises `Busy` where they would have to wait with too many others, `Broken` where the engine has stopped.
        """
        with self._wake:
            if self._stopping or not self.alive:
                raise Broken("the engine has stopped")
            room = self._most + max(0, self._slots - len(self._by_slot))
            if len(self._new) + len(jobs) > room:
                raise Busy
            self._new.extend(jobs)
            self._wake.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody wants the answers any more."""
        for job in jobs:
            job.cancelled = True
        with self._wake:
            self._wake.notify()

    def _run(self) -> None:
        try:
            with steer_slots(
                self.lm, self._slots, self._saes, directions=self._directions, keep=self._keep
            ) as steering:
                self._steering = steering
                self._ready.set()
                self._answer(steering)
        except Exception as error:
            progress.say(f"the engine has stopped: {type(error).__name__}: {error}")
        finally:
            with self._wake:
                self._stopping = True
                left = [*self._by_slot.values(), *self._new]
                self._by_slot.clear()
                self._new.clear()
            self._hand([(job, Broken("the server is stopping")) for job in left])
            self._ready.set()

    def _answer(self, steering: Slots) -> None:
        batch = Continuous(self.lm, self._slots)
        while self._wait(batch):
            self._leave(batch, steering)
            try:
                self._pass(batch, steering)
            except Exception as error:  # whatever it is, the server goes on without these answers
                progress.say(f"answers broken off: {type(error).__name__}: {error}")
                broken = [*self._by_slot.values()]
                batch = Continuous(self.lm, self._slots)
                self._finish(steering, broken, Broken(f"{type(error).__name__} while the answer was written"))

    def _wait(self, batch: Continuous) -> bool:
        """Wait until there is something to do; false when all is to end."""
        with self._wake:
            while not (self._stopping or self._new or batch.running):
                self._wake.wait()
            return not self._stopping

    def _leave(self, batch: Continuous, steering: Slots) -> None:
        """End answers that nobody wants, or that take too long."""
        now = time.monotonic()
        gone = [job for job in (*self._by_slot.values(), *self._new) if job.cancelled or job.deadline < now]
        if gone:
            batch.drop([job.slot for job in gone if job.slot is not None])
            with self._wake:
                for job in gone:
                    with suppress(ValueError):
                        self._new.remove(job)
            self._finish(steering, gone, TimeoutError("the answer took longer than the server allows"))

    def _pass(self, batch: Continuous, steering: Slots) -> None:
        """Let some of those that wait join, then write the next token of every answer."""
        if joining := self._admit(batch.free):
            self._join(joining, batch, steering)
        self._told(batch.step(), batch, steering)

    def _join(self, jobs: list[Job], batch: Continuous, steering: Slots) -> None:
        """Begin the answers; where that fails each by itself, so that one takes no other with it."""
        try:
            tokens = batch.join([self._wanted(job, steering) for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                progress.say(f"an answer could not begin: {type(error).__name__}: {error}")
                known = isinstance(error, DemurError)
                self._finish(steering, jobs, error if known else Broken(f"{type(error).__name__} at the prompt"))
                return
            for job in jobs:
                self._vacate(steering, job)
            for job in jobs:
                self._join([job], batch, steering)
        else:
            self._told(tokens, batch, steering)

    def _admit(self, free: int) -> list[Job]:
        """Those that may join now. All rows are as wide as the widest, so a long one waits until there is room."""
        found: list[Job] = []
        going = [*self._by_slot.values()]
        with self._wake:
            while self._new and len(found) < free:
                job = self._new[0]
                longest = max(len(one.ids) for one in (*found, job))
                widest = max(one.most for one in (*going, *found, job))
                beside = len(going) + len(found)
                if (found and longest * (len(found) + 1) > _PREFILL) or (beside and widest * (beside + 1) > self._room):
                    break
                found.append(self._new.popleft())
        return found

    def _wanted(self, job: Job, steering: Slots) -> Wanted:
        job.text = TextStream(self.lm.tokenizer, job.stops)

        def began(slot: int) -> None:
            steering.put(slot, job.spec)
            job.slot = slot
            self._by_slot[slot] = job

        return Wanted(job.ids, job.sampling, began)

    def _told(self, tokens: Sequence[Token], batch: Continuous, steering: Slots) -> None:
        """Turn tokens into pieces of text and hand them over, all in one go."""
        out: list[tuple[Job, Piece | Exception]] = []
        ended: list[Job] = []
        failed: list[Job] = []
        for token in tokens:
            job = self._by_slot[token.slot]
            assert job.text is not None
            if token.broken:
                failed.append(job)
                continue
            job.written += 1
            if job.written == 1:
                self._metrics.first(job.label, time.monotonic() - job.arrived)
            text = "" if token.stopped else job.text.add(token.drawn.token)
            finish: Finish | None = None
            if token.stopped or job.text.stopped:
                finish = "stop"
            elif token.last:
                finish = "length"
            if finish:
                text += job.text.end()
                finish = "stop" if job.text.stopped else finish
                ended.append(job)
            out.append((job, Piece(text, token.drawn, token.stopped, finish)))
        batch.drop([job.slot for job in ended if job.slot is not None])
        self._finish(steering, ended)
        self._hand(out)  # after the count: whoever has an answer finds it in the metrics
        self._finish(
            steering, failed, InputError("the model gives no numbers under this spec: its values are too large")
        )

    def _finish(self, steering: Slots, jobs: Sequence[Job], error: Exception | None = None) -> None:
        """Free the slots of answers that have left the batch, and tell who waits if they did so by an error."""
        for job in jobs:
            if happened := self._vacate(steering, job):
                gated = job.gated or job.spec.gate is not None
                self._metrics.answer(job.label, job.written, happened.steered, gated, error is None)
            if error is not None and not job.cancelled:
                self._hand([(job, error)])

    def _vacate(self, steering: Slots, job: Job) -> Tokens | None:
        """Free the slot of an answer, if it has one; what happened there."""
        slot, job.slot = job.slot, None
        if slot is None:
            return None
        del self._by_slot[slot]
        return steering.take(slot)

    def _hand(self, pieces: Sequence[tuple[Job, Piece | Exception]]) -> None:
        """Give to whom it belongs, all in one go."""

        def over() -> None:
            for job, piece in pieces:
                job.pieces.put_nowait(piece)

        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has ended, and with it who waited
            self._loop.call_soon_threadsafe(over)
