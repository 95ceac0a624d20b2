"""Photographs sent by HTTP/1.1 over kept connections, at little cost to the cores that the server shares.

httpx takes over a millisecond for each request; at four times what a server can answer that alone is a tenth
of a core. Bodies are multipart and ready made; httptools, which uvicorn has too, parses the answers.
"""

from __future__ import annotations

import asyncio
from typing import Self
from urllib.parse import urlsplit

import httptools
from closed_loop import HEADERS

KEPT_S = 4.0
"""A connection that was idle for longer is not used again: uvicorn closes it after 5 s, perhaps just then."""
HEAD = "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {type}\r\nContent-Length: {length}\r\n\r\n"


class Connection(asyncio.Protocol):
    """One request at a time; `idle` holds it while it has none and stays open."""

    def __init__(self, idle: list[Connection]) -> None:
        self.idle = idle
        self.transport: asyncio.Transport | None = None
        self.parser = httptools.HttpResponseParser(self)
        self.body = bytearray()
        self.answer: asyncio.Future[tuple[int, bytes]] | None = None
        self.idle_since = 0.0

    @property
    def is_fresh(self) -> bool:
        """The server will not close it at this moment for having been idle."""
        return asyncio.get_running_loop().time() - self.idle_since < KEPT_S

    def ask(self, request: list[bytes]) -> asyncio.Future[tuple[int, bytes]]:
        """The status and the body of the answer; ConnectionResetError where it ends without one."""
        assert self.transport is not None and self.answer is None
        self.answer = asyncio.get_running_loop().create_future()
        self.parser, self.body = httptools.HttpResponseParser(self), bytearray()
        self.transport.writelines(request)
        return self.answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(error)

    def on_body(self, body: bytes) -> None:
        """httptools: a part of it."""
        self.body += body

    def on_message_complete(self) -> None:
        """httptools: the answer is whole."""
        assert self.transport is not None
        answer, self.answer = self.answer, None
        if answer is not None and not answer.done():
            answer.set_result((self.parser.get_status_code(), bytes(self.body)))
        if self.parser.should_keep_alive() and answer is not None:
            self.idle_since = asyncio.get_running_loop().time()
            self.idle.append(self)
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or ConnectionResetError("closed without an answer"))

    def _end(self, why: Exception) -> None:
        if self in self.idle:
            self.idle.remove(self)
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(why)
        self.answer = None
        if self.transport is not None:
            self.transport.abort()


class LightClient:
    """`async with LightClient(30) as client`: as many connections as requests under way, the newest idle
    one first."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.idle: dict[str, list[Connection]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connections in self.idle.values():
            for each in list(connections):
                if each.transport is not None:
                    each.transport.abort()
        await asyncio.sleep(0)  # so that they are closed

    async def post(self, url: str, body: bytes) -> tuple[int, bytes]:
        """Send a multipart body to http://HOST:PORT/PATH. Raises OSError, TimeoutError or HttpParserError."""
        to = urlsplit(url)
        idle = self.idle.setdefault(to.netloc, [])
        path = f"{to.path or '/'}?{to.query}" if to.query else to.path or "/"
        head = HEAD.format(path=path, host=to.netloc, type=HEADERS["Content-Type"], length=len(body))
        async with asyncio.timeout(self.timeout_s):
            if idle and idle[-1].is_fresh:  # the newest; those below it are older
                connection = idle.pop()
            else:
                connection = await self._connected(to.hostname or "", to.port or 80, idle)
            try:
                return await connection.ask([head.encode(), body])
            except asyncio.CancelledError:
                assert connection.transport is not None
                connection.transport.abort()  # its answer would be taken for the next one's
                raise

    @staticmethod
    async def _connected(host: str, port: int, idle: list[Connection]) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(idle), host, port)
        return connection
