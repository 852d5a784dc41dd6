"""Errors as OpenAI's API writes them, one clear sentence each."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

_KINDS = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}


def error_body(status: int, sentence: str, param: str | None = None, kind: str = "") -> dict[str, Any]:
    """The JSON of an error."""
    known = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": sentence, "type": known, "param": param, "code": kind or None}}


def error_response(status: int, sentence: str, param: str | None = None, kind: str = "") -> JSONResponse:
    """The same as a response."""
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(error_body(status, sentence, param, kind), status, headers)
