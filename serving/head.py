"""Uvicorn's HTTP/1.1 protocol, which waits for a request's head neither for ever nor without a bound.

httptools knows no limit for headers, and uvicorn's keep-alive timeout ends with a request's first byte: a
client that sends a byte a second, or headers without end, would keep its connection, and fill memory.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 1024


class HeadBounded(HttpToolsProtocol):
    """Closes a connection whose head is not complete after `head_timeout_s`, or larger than the limit."""

    head_timeout_s: ClassVar[float] = 10.0

    @classmethod
    def within(cls, seconds: float) -> type[HeadBounded]:
        """The protocol with another timeout, for `uvicorn.Config(http=...)`."""
        return type(cls.__name__, (cls,), {"head_timeout_s": seconds})

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_begins()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_begins()

    def on_headers_complete(self) -> None:
        self._head_ends()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_ends()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_timer is not None:
            # What came before and did not complete it: the rest of this piece may be body.
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("The request's headers are too large.")
                return
            self._head_bytes += len(data)
        super().data_received(data)

    def _head_begins(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._too_slow)

    def _head_ends(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer, self._head_bytes = None, 0

    def _too_slow(self) -> None:
        self._head_timer = None
        self.transport.close()
