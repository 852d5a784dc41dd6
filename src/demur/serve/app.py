"""The web application: OpenAI's chat and text completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from demur import progress
from demur.errors import DemurError, InputError, NotFoundError
from demur.lm.chat import chat_ids, text_ids, with_system
from demur.lm.sampling import Sampling
from demur.serve import protocol as p
from demur.serve.engine import Broken, Busy, Engine, Job, Piece
from demur.serve.errors import error_body, error_response
from demur.serve.guard import App, Guard
from demur.serve.metrics import Metrics
from demur.serve.wording import Words, chat_logprobs, text_logprobs
from demur.spec import SteeringSpec, TextGate
from demur.steering.spec_book import SpecBook
from demur.text_gates import decide, opened
from demur.types import Message, Prompt, stable_hash
from demur.verbs.serve_config import Serve

_RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": p.ErrorAnswer, "description": text}
    for code, text in {
        400: "The request is not understood, or asks for what is not there.",
        401: "The API key is missing or wrong.",
        404: "There is no such model or spec.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        429: "Too many answers wait.",
        503: "The engine has stopped, or the classifier of the spec's gate does not answer.",
        500: "The answer was broken off.",
        504: "The answer took too long.",
    }.items()
}
_DECIDING = 8
"""Requests whose text gate is decided at the same time."""
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


class Asked(NamedTuple):
    """A request that was understood."""

    model: str
    """The name that it gave."""
    spec: SteeringSpec
    prompts: list[list[int]]
    """Token ids."""
    talks: list[tuple[Message, ...]]
    """Each prompt's conversation, as a text gate reads it."""
    decided: list[SteeringSpec]
    """What steers each prompt: the spec, or what its text gate has made of it."""
    sampling: Sampling
    stops: list[str]
    n: int
    """Answers to each prompt."""
    words: Words
    """How the answer is written down."""
    usage: bool
    """A stream ends with the usage."""


class Server:
    """What requests need."""

    def __init__(self, engine: Engine, book: SpecBook, config: Serve, name: str) -> None:
        self.engine, self.book, self.config, self.name = engine, book, config, name
        self.created = int(time.time())
        self.deciding = ThreadPoolExecutor(_DECIDING, "demur-gate")
        """Where text gates are decided."""
        self._undecided = 0

    def models(self) -> list[p.Model]:
        """The model under its own name, which means the default spec, and each spec."""
        named = {self.name: self.book.default}
        if not self.book.locked:
            named |= self.book.specs
        return [p.Model(id=name, created=self.created, spec=spec.hash) for name, spec in named.items()]

    def understood(self, request: p.ChatRequest | p.CompletionRequest) -> Asked:
        """What is asked. Raises `DemurError` for what is not there or does not fit."""
        of_model = None if request.model in (self.name, self.config.model) else request.model
        try:
            spec = self.book.find([of_model, *request.specs])
        except NotFoundError:
            if of_model is not None and of_model not in self.book.specs:
                known = ", ".join(model.id for model in self.models())
                raise NotFoundError(f"there is no model {of_model[:80]!r}; there are {known}") from None
            raise
        if self.book.label(spec) == "inline":
            self._check_classifier(spec)
            self.engine.check(opened(spec))
        n = request.n or 1
        chat = isinstance(request, p.ChatRequest)
        if not chat and spec.system:
            raise InputError("the spec has a system prompt, for which there is no place in plain text; ask as a chat")
        if isinstance(request, p.ChatRequest):
            talks = [self._turns(request, spec)]
            prompts = [chat_ids(self.engine.lm, talks[0])]
        else:
            prompts = self._texts(request)
            said = [str(self.engine.lm.tokenizer.decode(ids, skip_special_tokens=True)) for ids in prompts]
            talks = [(Message("user", text),) for text in said]
        if len(prompts) * n > self.config.most_answers:
            raise InputError(
                f"{len(prompts) * n} answers are asked for, but one request may have at most "
                f"{self.config.most_answers}; send several requests"
            )
        top = (request.top_logprobs or 0) if chat and request.logprobs else None if chat else request.logprobs  # type: ignore[union-attr]
        return Asked(
            request.model,
            spec,
            prompts,
            talks,
            [spec] * len(prompts),
            Sampling(
                max_new_tokens=self._room(max(map(len, prompts)), request.most_tokens),
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                top_k=max(0, request.top_k or 0),
                seed=request.seed,
                presence_penalty=request.presence_penalty or 0.0,
                frequency_penalty=request.frequency_penalty or 0.0,
                logit_bias=self._bias(request.logit_bias or {}),
                top_logprobs=top,
            ),
            request.stops,
            n,
            Words(self.engine.lm.tokenizer, chat),
            bool(request.stream_options and request.stream_options.include_usage),
        )

    def _check_classifier(self, spec: SteeringSpec) -> None:
        """Raise `InputError` for a text gate that would have the server load or ask what its operator has not named."""
        gates = [one.gate for one in (*self.book.specs.values(), spec) if isinstance(one.gate, TextGate)]
        named = [(gate.classifier, gate.label) for gate in gates]
        if isinstance(spec.gate, TextGate) and named[-1] not in named[:-1]:
            asks = f"{spec.gate.classifier[:80]!r} for {spec.gate.label[:80]!r}"
            raise InputError(
                f"the spec's gate asks {asks}, but a request may name only classifiers, with their labels, of "
                "the specs that this server offers; name one of those specs"
            )

    async def decided(self, asked: Asked) -> Asked:
        """What a text gate makes of it, in threads of its own, so that a slow classifier holds up nobody else.

        Raises `Broken` where that cannot be told, for then nothing is answered, and `Busy` where too many wait for it.
        """
        if self._undecided >= _DECIDING + self.config.waiting:
            raise Busy
        self._undecided += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.deciding, self._decide, asked)
        finally:
            self._undecided -= 1

    def _decide(self, asked: Asked) -> Asked:
        try:
            return asked._replace(decided=decide([asked.spec] * len(asked.talks), asked.talks, self.engine.lm.device))
        except Exception as error:  # whatever it is, an answer that is not steered is none
            why = str(error) if isinstance(error, DemurError) else f"{type(error).__name__}: {error}"
            progress.say(f"a text gate could not be decided: {why}")
            raise Broken(
                "the classifier of the spec's gate did not answer, so neither does the model; try again later, or tell "
                "the server's operator"
            ) from error

    def _turns(self, request: p.ChatRequest, spec: SteeringSpec) -> tuple[Message, ...]:
        turns = tuple(Message("system" if m.role == "developer" else m.role, m.text) for m in request.messages)
        if self.book.locked and spec.system and turns[0].role == "system":
            turns = (Message("system", f"{spec.system}\n\n{turns[0].content}"), *turns[1:])
        return with_system(Prompt("request", turns, "benign", "request"), spec.system)

    def _texts(self, request: p.CompletionRequest) -> list[list[int]]:
        given: list[Any] = request.prompt if isinstance(request.prompt, list) else [request.prompt]
        if given and isinstance(given[0], int):
            given = [given]
        vocab = self.engine.lm.model.config.get_text_config().vocab_size
        found = []
        for one in given:
            ids = text_ids(self.engine.lm, one, special=True) if isinstance(one, str) else list(one)
            if not ids or not all(0 <= token < vocab for token in ids):
                raise InputError(f"a prompt is empty or has token ids that are not from 0 to {vocab - 1}; give text")
            found.append(ids)
        if not found:
            raise InputError("there is no prompt; give at least one")
        return found

    def _bias(self, given: dict[str, float]) -> dict[int, float]:
        vocab = self.engine.lm.model.config.get_text_config().vocab_size
        found = {int(key): value for key, value in given.items()}
        if wrong := [token for token in found if token >= vocab]:
            raise InputError(f"logit_bias names the token {wrong[0]}, but the last one is {vocab - 1}")
        return found

    def _room(self, length: int, wanted: int | None) -> int:
        """How many tokens an answer may have."""
        context = self.engine.lm.context
        if context is None:
            return wanted or self.config.max_new_tokens
        left = context - length
        if left < (wanted or 1):
            raise InputError(
                f"the prompt has {length} tokens and the answer may have {wanted or 1}, but the model reads at most "
                f"{context} together; shorten the prompt, or ask for fewer"
            )
        return wanted or min(left, self.config.max_new_tokens)

    def jobs(self, asked: Asked) -> list[Job]:
        """An answer for each choice, submitted. Raises `Busy`."""
        label = self.book.label(asked.spec)
        deadline = time.monotonic() + self.config.timeout
        found = []
        gated = isinstance(asked.spec.gate, TextGate)
        for prompt, spec in zip(asked.prompts, asked.decided, strict=True):
            for number in range(asked.n):
                seed = asked.sampling.seed
                sampling = replace(asked.sampling, seed=None if seed is None else seed + number)
                found.append(Job(prompt, sampling, spec, label, asked.stops, deadline, gated=gated))
        self.engine.submit(found)
        return found

    def about(self, asked: Asked) -> dict[str, Any]:
        """Of an answer, what does not depend on it."""
        lm = self.engine.lm
        return {
            "id": f"{'chatcmpl' if asked.words.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": stable_hash([lm.weights, asked.spec.hash]),
        }


def make_app(server: Server, metrics: Metrics) -> App:
    """The application; the engine starts and stops with it."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        server.engine.start(asyncio.get_running_loop())
        try:
            yield
        finally:
            await asyncio.to_thread(server.engine.stop)
            server.deciding.shutdown(wait=False, cancel_futures=True)

    # no pages of documentation: they load scripts from elsewhere
    app = FastAPI(title="demur", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    metrics.follow(lambda: server.engine.running, lambda: server.engine.waiting)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, error: RequestValidationError) -> Response:
        return error_response(400, *_first(error))

    @app.exception_handler(HTTPException)
    async def _http(_request: Request, error: HTTPException) -> Response:
        found = error_response(error.status_code, f"{error.detail}")
        found.headers.update(error.headers or {})
        return found

    @app.exception_handler(NotFoundError)
    async def _missing(_request: Request, error: NotFoundError) -> Response:
        return error_response(404, str(error), "model", "model_not_found")

    @app.exception_handler(DemurError)
    async def _wrong(_request: Request, error: DemurError) -> Response:
        return error_response(400, str(error))

    @app.exception_handler(Broken)
    async def _stopped(_request: Request, error: Broken) -> Response:
        return error_response(503, f"{error}")

    @app.exception_handler(Exception)
    async def _unforeseen(_request: Request, error: Exception) -> Response:
        return error_response(500, f"the server failed at this request ({type(error).__name__})")

    @app.exception_handler(Busy)
    async def _busy(_request: Request, _error: Busy) -> Response:
        return error_response(429, "too many answers wait already; try again in a moment")

    @app.get("/health", responses={503: {"model": p.Health, "description": "The engine has stopped."}})
    async def health() -> p.Health:
        """Whether answers can be written."""
        engine = server.engine
        found = p.Health(
            status="ok" if engine.alive else "stopped",
            model=server.name,
            running=engine.running,
            waiting=engine.waiting,
        )
        if not engine.alive:
            return Response(found.model_dump_json(), 503, media_type="application/json")  # type: ignore[return-value]
        return found

    @app.get("/metrics", response_class=PlainTextResponse)
    async def counted() -> Response:
        """Counters for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", responses={401: _RESPONSES[401]})
    async def models() -> p.Models:
        """The model, and each spec as a model."""
        return p.Models(data=server.models())

    @app.get("/v1/models/{model:path}", responses={401: _RESPONSES[401], 404: _RESPONSES[404]})
    async def model(model: str) -> p.Model:
        """One of them."""
        for one in server.models():
            if one.id == model:
                return one
        raise NotFoundError(f"there is no model {model[:80]!r}")

    @app.post("/v1/chat/completions", response_model=p.ChatAnswer, responses=_RESPONSES | _STREAM)
    async def chat(request: p.ChatRequest, raw: Request) -> Any:
        """Answer a conversation."""
        return await _answer(server, request, raw)

    @app.post("/v1/completions", response_model=p.TextAnswer, responses=_RESPONSES | _STREAM)
    async def complete(request: p.CompletionRequest, raw: Request) -> Any:
        """Go on with a text."""
        return await _answer(server, request, raw)

    config = server.config
    return Guard(app, metrics, config.key, config.max_body, config.body_timeout, config.timeout + 30)


async def _answer(server: Server, request: p.ChatRequest | p.CompletionRequest, raw: Request) -> Any:
    asked = await asyncio.to_thread(server.understood, request)
    if isinstance(asked.spec.gate, TextGate):
        asked = await server.decided(asked)
    jobs = server.jobs(asked)
    if request.stream:
        events = _events(server, asked, jobs)
        first = await _first_event(events, server, jobs, raw)
        if isinstance(first, Response):
            return first
        return StreamingResponse(_from(first, events), media_type="text/event-stream")
    with _cancelled(server, jobs):
        gathered = asyncio.ensure_future(asyncio.gather(*(_whole(job) for job in jobs)))
        gone = asyncio.ensure_future(_disconnected(raw))
        try:
            both: set[asyncio.Future[Any]] = {gathered, gone}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not gathered.done():
                return Response(status_code=499)  # nobody reads it
            return _body(server, asked, jobs, gathered.result())
        except Exception as error:
            return _failed(error)
        finally:
            gone.cancel()
            gathered.cancel()


@contextmanager
def _cancelled(server: Server, jobs: Sequence[Job]) -> Iterator[None]:
    """Whatever is not finished when the block is left is not wanted any more."""
    try:
        yield
    finally:
        server.engine.cancel(jobs)


async def _disconnected(raw: Request) -> None:
    while not await raw.is_disconnected():
        await asyncio.sleep(0.2)


async def _pieces(job: Job) -> AsyncIterator[Piece]:
    while True:
        piece = await job.pieces.get()
        if isinstance(piece, Exception):
            raise piece
        yield piece
        if piece.finish:
            return


async def _whole(job: Job) -> list[Piece]:
    return [piece async for piece in _pieces(job)]


def _failed(error: Exception) -> Response:
    """The response for an answer that came to no end."""
    if isinstance(error, TimeoutError):
        return error_response(504, str(error))
    if isinstance(error, DemurError):
        return error_response(400, str(error))
    if isinstance(error, Broken):
        return error_response(500, str(error))
    raise error


def _usage(jobs: Sequence[Job], written: int, n: int) -> p.Usage:
    read = sum(len(job.ids) for job in jobs[::n])
    return p.Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def _body(server: Server, asked: Asked, jobs: Sequence[Job], answers: Sequence[list[Piece]]) -> BaseModel:
    about = server.about(asked) | {"usage": _usage(jobs, sum(map(len, answers)), asked.n)}
    texts = ["".join(piece.text for piece in pieces) for pieces in answers]
    ends: list[Any] = [pieces[-1].finish for pieces in answers]
    if asked.words.chat:
        chat = [
            p.ChatChoice(
                index=i,
                message=p.AnswerMessage(content=text),
                logprobs=chat_logprobs(asked.words, asked.sampling, pieces),
                finish_reason=end,
            )
            for i, (text, end, pieces) in enumerate(zip(texts, ends, answers, strict=True))
        ]
        return p.ChatAnswer(choices=chat, **about)
    plain = [
        p.TextChoice(index=i, text=text, logprobs=text_logprobs(asked.words, asked.sampling, pieces), finish_reason=end)
        for i, (text, end, pieces) in enumerate(zip(texts, ends, answers, strict=True))
    ]
    return p.TextAnswer(choices=plain, **about)


async def _events(server: Server, asked: Asked, jobs: Sequence[Job]) -> AsyncIterator[str]:
    """Server-sent events of all choices, as they come."""
    about = server.about(asked)
    with _cancelled(server, jobs):
        mixed: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

        async def follow(index: int, job: Job) -> None:
            try:
                async for piece in _pieces(job):
                    mixed.put_nowait((index, piece))
            except Exception as error:
                mixed.put_nowait((index, error))

        followers = [asyncio.ensure_future(follow(index, job)) for index, job in enumerate(jobs)]
        try:
            going, written = len(jobs), 0
            offsets = [0] * len(jobs)
            if asked.words.chat:
                start = [p.ChatChunkChoice(index=i, delta=p.Delta(role="assistant", content="")) for i in range(going)]
                first = _event(p.ChatChunk(choices=start, **about))
            else:
                first = ""
            while going:
                index, piece = await mixed.get()
                if isinstance(piece, Exception):
                    raise piece
                written += 1
                going -= bool(piece.finish)
                yield first + _event(_chunk(asked, about, index, piece, offsets))
                first = ""
            if asked.usage:
                kind: Any = p.ChatChunk if asked.words.chat else p.TextAnswer
                yield _event(kind(choices=[], usage=_usage(jobs, written, asked.n), **about))
            yield "data: [DONE]\n\n"
        finally:
            for follower in followers:
                follower.cancel()


def _chunk(asked: Asked, about: dict[str, Any], index: int, piece: Piece, offsets: list[int]) -> BaseModel:
    if asked.words.chat:
        choice = p.ChatChunkChoice(
            index=index,
            delta=p.Delta(content=piece.text),
            logprobs=chat_logprobs(asked.words, asked.sampling, [piece]),
            finish_reason=piece.finish,
        )
        return p.ChatChunk(choices=[choice], **about)
    logprobs = text_logprobs(asked.words, asked.sampling, [piece], offsets[index])
    offsets[index] += len(asked.words.of(piece.drawn.token))
    text = p.TextChoice(index=index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish)
    return p.TextAnswer(choices=[text], **about)


def _event(value: BaseModel) -> str:
    told = value.model_dump(exclude_none=True)
    for choice in told["choices"]:
        choice.setdefault("finish_reason", None)  # clients look whether it is null
    return f"data: {json.dumps(told, ensure_ascii=False)}\n\n"


async def _first_event(events: AsyncIterator[str], server: Server, jobs: Sequence[Job], raw: Request) -> str | Response:
    """The first event, or the response where there will be none, so that such a request has a status of its own."""
    coming = asyncio.ensure_future(anext(events))
    gone = asyncio.ensure_future(_disconnected(raw))
    both: set[asyncio.Future[Any]] = {coming, gone}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            server.engine.cancel(jobs)
            return Response(status_code=499)  # nobody reads it
        return coming.result()
    except Exception as error:
        return _failed(error)
    finally:
        gone.cancel()
        coming.cancel()


async def _from(first: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        yield first
        async for event in events:
            yield event
    except (Broken, TimeoutError, DemurError) as error:
        status = 504 if isinstance(error, TimeoutError) else 500
        yield f"data: {json.dumps(error_body(status, str(error)))}\n\n"
    finally:
        await events.aclose()  # type: ignore[attr-defined]


def _first(error: RequestValidationError) -> tuple[str, str | None]:
    """One sentence, and the field it is about."""
    found = error.errors()[0]
    where = [str(part) for part in found["loc"] if part not in ("body", "query", "path")]
    what = str(found["msg"]).removeprefix("Value error, ")
    if found["type"] == "json_invalid":
        return f"the body is not JSON ({found.get('ctx', {}).get('error', what)})", None
    field = ".".join(where)
    if found["type"] == "extra_forbidden":
        return f"{field} is not supported by this server; leave it out", field
    if not field:
        return f"the body is not understood: {what}", None
    return f"{field}: {what}", field
