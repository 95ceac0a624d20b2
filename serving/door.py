"""Who comes in (pure ASGI): an API key on each request but those that need none, and as often as it may.

Nothing of a body has been read when a request is turned away.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.bucket import TokenBucket
from serving.errors import RateLimited, ServingError, Unauthorized
from serving.keys import ApiKey, KeyFile
from serving.sides import on_ops_side

Refuse = Callable[[Request, Exception], Awaitable[Response]]

KEY_HEADER: Final = "X-API-Key"
METERED: Final = "/classify"
"""What a key's rate counts: photographs. Labels and the like cost nothing."""

OPEN: Final = frozenset({"/", "/livez", "/readyz", "/docs", "/openapi.json"})
OPEN_FOLDERS: Final = ("/page/", "/docs/assets/")
"""The page and the description of the interface, so that there is where to type a key in, and what
balancers ask. Every other route wants a key, also one that is added later."""


def presented_key(headers: Headers) -> bytes | None:
    """`Authorization: Bearer KEY`, or `X-API-Key: KEY`."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip().encode("latin-1")
    return headers.get(KEY_HEADER, "").strip().encode("latin-1") or None


class Door:
    """Lets in whoever shows a key, under the key's name: `scope["state"]["client"]`."""

    def __init__(self, app: ASGIApp, keys: KeyFile, refuse: Refuse) -> None:
        self._app, self._keys, self._refuse = app, keys, refuse
        self._buckets: dict[str, TokenBucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope["path"]) or on_ops_side(scope):
            await self._app(scope, receive, send)
            return

        async def send_unstored(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Caches know not to share what `Authorization` asked for; of X-API-Key they know nothing.
                MutableHeaders(scope=message).setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            key = self._identified(scope)
            scope.setdefault("state", {})["client"] = key.name
            if scope["path"] == METERED:
                self._meter(key)
        except ServingError as error:
            answer = await self._refuse(Request(scope, receive), error)
            await answer(scope, receive, send_unstored)
            return
        await self._app(scope, receive, send_unstored)

    def _identified(self, scope: Scope) -> ApiKey:
        presented = presented_key(Headers(scope=scope))
        if presented is None:
            raise Unauthorized(f"an API key is needed: Authorization: Bearer KEY, or {KEY_HEADER}: KEY")
        key = self._keys.find(presented)
        if key is None:
            raise Unauthorized("this API key is not known here", presented=True)
        return key

    def _meter(self, key: ApiKey) -> None:
        if key.rate is None:
            self._buckets.pop(key.name, None)
            return
        bucket = self._buckets.setdefault(key.name, TokenBucket(key.rate, key.bucket_size))
        bucket.resize(key.rate, key.bucket_size)
        wait_s = bucket.take()
        if wait_s:
            raise RateLimited(
                f"the key {key.name} may ask for {key.rate:g} photographs a second, "
                f"{key.bucket_size:g} at once", retry_after_s=wait_s
            )


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith(OPEN_FOLDERS)


def describe_keys(app: FastAPI) -> None:
    """Say in /openapi.json which routes want a key, and how it is shown; /docs then has a field for it."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        schema = plain()  # made once, then kept by the app
        schemes = schema.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["bearer"] = {"type": "http", "scheme": "bearer"}
        schemes["header"] = {"type": "apiKey", "in": "header", "name": KEY_HEADER}
        for path, operations in schema["paths"].items():
            if not _is_open(path):
                for operation in operations.values():
                    operation["security"] = [{"bearer": []}, {"header": []}]
        return schema

    app.openapi = described  # type: ignore[method-assign]  # as FastAPI's own guide has it
