"""Two ports, one app (pure ASGI): what the public asks, and what only operators should see."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

_MARK: Final = "ops"
_OPS_ONLY: Final = frozenset({"/metrics", "/docs", "/openapi.json"})
_OPS_FOLDER: Final = "/docs/assets/"
_ON_BOTH: Final = frozenset({"/livez", "/readyz"})
_PARTS_OF_DOCS: Final = frozenset({"/page/docs.js", "/page/icon.svg"})


class OpsSide:
    """What the second port serves: the same app, each request marked with where it came in."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})[_MARK] = True
        await self._app(scope, receive, send)


def on_ops_side(scope: Scope) -> bool:
    """Whether the request came in at the operators' port."""
    return bool(scope.get("state", {}).get(_MARK))


class Sides:
    """Each side's routes; the other's are 404, as if they were not there."""

    def __init__(self, app: ASGIApp, refuse: Callable[[Request, Exception], Awaitable[Response]]) -> None:
        self._app, self._refuse = app, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_here(scope["path"], on_ops_side(scope)):
            answer = await self._refuse(Request(scope, receive), HTTPException(404))
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)


def without_ops_links(page: str) -> str:
    """HTML without the lines that point to what only operators see."""
    dead = [f'href="{path}"' for path in _OPS_ONLY]
    return "".join(line for line in page.splitlines(keepends=True) if not any(link in line for link in dead))


def _is_here(path: str, ops: bool) -> bool:
    if path in _ON_BOTH:
        return True
    if path in _OPS_ONLY or path.startswith(_OPS_FOLDER):
        return ops
    return not ops or path in _PARTS_OF_DOCS
