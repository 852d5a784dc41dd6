"""What every request passes before the app sees it: its size, its time, its key."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from demur.serve.errors import error_response
from demur.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
_KNOWN = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/metrics", "/openapi.json")


class Guard:
    """An ASGI app around another. Bodies are read whole before the other app is called."""

    def __init__(self, app: App, metrics: Metrics, key: str, most_bytes: int, body_seconds: float, seconds: float):
        """`key`: asked for on everything under /v1; empty for none. `seconds`: a whole request may take."""
        self._app, self._metrics, self._key = app, metrics, key
        self._most, self._body_seconds, self._seconds = most_bytes, body_seconds, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)

        try:
            # a client that reads too slowly holds its connection no longer than this
            async with asyncio.timeout(self._seconds):
                await self._checked(scope, receive, watched)
        except TimeoutError:
            if not status:
                await error_response(504, "the request took longer than the server allows")(scope, receive, watched)
        finally:
            path = scope["path"]
            known = path if path in _KNOWN or path.startswith("/v1/models/") else "other"
            self._metrics.request("/v1/models/MODEL" if known.startswith("/v1/models/") else known, status)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._key and scope["path"].startswith("/v1"):
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, self._key.encode()):
                refusal = error_response(401, "the API key is missing or wrong; send it as a bearer token", kind="auth")
                await refusal(scope, receive, send)
                return
        stated = headers.get(b"content-length", b"0")
        if not stated.isdigit() or int(stated) > self._most:
            await self._too_large(scope, receive, send)
            return
        body = bytearray()
        more = True
        try:
            async with asyncio.timeout(self._body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._most:
                        await self._too_large(scope, receive, send)
                        return
        except TimeoutError:
            sentence = f"the body did not arrive within {self._body_seconds:g} s; send it at once"
            await error_response(408, sentence)(scope, receive, send)
            return
        given_body = False

        async def replayed() -> Message:
            nonlocal given_body
            if given_body:
                return await receive()
            given_body = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, replayed, send)

    async def _too_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        sentence = f"the body is larger than the {self._most:,} bytes that this server takes; send less"
        await error_response(413, sentence)(scope, receive, send)
