"""The outermost layer (pure ASGI): a request id, security headers, and an answer whatever fails."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_SANE_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SECURITY: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


logger = logging.getLogger("alexnet.gateway")


class RequestHeaders:
    """Takes the client's X-Request-ID where it is sane, makes one otherwise, and returns it.

    `failed` makes the answer to a request whose handling raised; the log has the trace. Over TLS, ours or
    a trusted proxy's, browsers are told to come back over TLS for `hsts_max_age_s`; 0: they are not.
    """

    def __init__(
        self, app: ASGIApp, failed: Callable[[str], Response], hsts_max_age_s: int = 0
    ) -> None:
        self._app, self._failed = app, failed
        self._over_tls = {**_SECURITY}
        if hsts_max_age_s:
            self._over_tls["Strict-Transport-Security"] = f"max-age={hsts_max_age_s}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False
        security = self._over_tls if scope.get("scheme") == "https" else _SECURITY

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                for name, value in security.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            logger.exception("request %s failed", request_id)
            if started:
                raise  # half an answer is out: the connection must break, not look complete
            await self._failed(request_id)(scope, receive, send_with_headers)
