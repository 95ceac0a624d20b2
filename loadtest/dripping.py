"""Clients that send a byte a second, half of them in the middle of a request's head, half in a photograph.

    async with dripping(url, 500) as drips: ...

One that the server has closed connects again at once, so that so many are there all the time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import cycle

PAUSE_S = 1.0
_HEAD = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 100000\r\n"


@dataclass
class Drips:
    """What became of them so far."""

    connected: int = 0
    bytes_sent: int = 0
    closed: int = 0
    refused: int = 0


@asynccontextmanager
async def dripping(url: str, count: int) -> AsyncIterator[Drips]:
    """So many clients of http://HOST:PORT under way while the block runs."""
    host, port = url.removeprefix("http://").split(":")
    drips = Drips()
    clients = [asyncio.create_task(_drip(host, int(port), drips, in_head=n % 2 == 0)) for n in range(count)]
    try:
        yield drips
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def _drip(host: str, port: int, drips: Drips, *, in_head: bool) -> None:
    await asyncio.sleep(PAUSE_S * random.random())
    while True:
        try:
            reader, writer = await asyncio.open_connection(host, port)
        except OSError:
            drips.refused += 1
            await asyncio.sleep(PAUSE_S)
            continue
        drips.connected += 1
        try:
            if not in_head:
                writer.write(_HEAD + b"\r\n\xff\xd8\xff")
            with suppress(ConnectionError):
                await _drip_until_closed(reader, writer, _HEAD if in_head else b"x", drips)
        finally:
            drips.connected -= 1
            writer.transport.abort()
        drips.closed += 1


async def _drip_until_closed(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, letters: bytes, drips: Drips
) -> None:
    for letter in cycle(letters):
        writer.write(bytes([letter]))
        await writer.drain()
        drips.bytes_sent += 1
        with suppress(TimeoutError):
            while await asyncio.wait_for(reader.read(65536), PAUSE_S):
                pass
            return  # the server has closed it
