"""The end of a process, as its clients see it: each answer closes its connection, /readyz says 503."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import Stopping


class Drain:
    """Whether this process was asked to end. Requests are answered all the same, as long as any come."""

    def __init__(self) -> None:
        self.begun = False

    def check(self) -> None:
        """Raise Stopping once it has begun."""
        if self.begun:
            raise Stopping("this server is being stopped; send what is new to another one")


class ClosingConnections:
    """`Connection: close` on each answer once the end has begun.

    Clients that keep connections then open their next one elsewhere, and none is asked on a connection
    at the moment that it is closed.
    """

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app, self._drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._drain.begun:
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self._app(scope, receive, send_closing)
