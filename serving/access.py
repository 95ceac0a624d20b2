"""One log line a request (pure ASGI): who asked, what was answered, how long each stage took.

Never in it: what a photograph shows or is called, the query, a header as it came.
"""

from __future__ import annotations

import logging
import re
import time
from http import HTTPStatus
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

QUIET: Final = frozenset({"/livez", "/readyz", "/metrics"})
"""Asked every few seconds by machines: told at DEBUG as long as they are answered well."""

_LONGEST_PATH: Final = 200
_TRACEPARENT: Final = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C Trace Context, section 3.2: all zeros is no trace."""

logger = logging.getLogger("alexnet.access")


def note(request: Request, **facts: Any) -> None:
    """Have the request's line tell this as well."""
    _noted(request.scope).update(facts)


def _noted(scope: Scope) -> dict[str, Any]:
    noted: dict[str, Any] = scope.setdefault("state", {}).setdefault("noted", {})
    return noted


class AccessLog:
    """Outside everything else, so that each request leaves its line, however it ended.

    Levels: WARNING for 5xx and for a request that was left without an answer, otherwise INFO.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen, started = _Seen(), time.perf_counter()

        async def counted_receive() -> Message:
            message = await receive()
            seen.bytes_in += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
            seen.bytes_out += len(message.get("body", b""))
            await send(message)
            seen.whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, counted_receive, counted_send)
        finally:
            level = _level(scope["path"], seen)
            if logger.isEnabledFor(level):
                total_ms = 1000 * (time.perf_counter() - started)
                logger.log(level, "request", extra={"fields": _fields(scope, seen, total_ms)})


class _Seen:
    """What passed by: bytes of the bodies, the answer's status (None: there was none)."""

    status: int | None = None
    whole = False
    bytes_in = 0
    bytes_out = 0


def _level(path: str, seen: _Seen) -> int:
    if seen.status is None or not seen.whole or seen.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return logging.WARNING
    return logging.DEBUG if path in QUIET and seen.status < HTTPStatus.BAD_REQUEST else logging.INFO


def _fields(scope: Scope, seen: _Seen, total_ms: float) -> dict[str, Any]:
    state, address = scope.get("state", {}), scope.get("client")
    fields: dict[str, Any] = {
        "request_id": state.get("request_id"),
        "client": address[0] if address else None,
        "key": state.get("client"),  # an API key's name
        "method": scope["method"],
        "path": scope["path"][:_LONGEST_PATH],
        "status": seen.status,
        "cut_off": True if seen.status and not seen.whole else None,
        "bytes_in": seen.bytes_in,
        "bytes_out": seen.bytes_out,
        "trace_id": state.get("trace_id") or _trace_id(scope),
    }
    noted = {**_noted(scope)}
    ms = {**noted.pop("ms", {}), "total": total_ms}
    told = {**fields, **noted, "ms": {stage: round(taken, 3) for stage, taken in ms.items()}}
    return {name: value for name, value in told.items() if value is not None}


def _trace_id(scope: Scope) -> str | None:
    """The trace that the client says this request belongs to."""
    match = _TRACEPARENT.fullmatch(Headers(scope=scope).get("traceparent", ""))
    return match[1] if match else None
