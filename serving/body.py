"""The upload out of a request: bytes counted as they arrive, nothing written to disk."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from serving.errors import MalformedRequest, Overloaded, TooManyBytes, UnsupportedFormat

FIELD: Final = "file"
_MULTIPART_BYTES: Final = 10_000
"""Room for boundaries and part headers around the file."""

_DRAIN_S: Final = 5.0
"""How long the rest of a refused body is read and dropped, so that the client, still sending,
sees the answer and not a reset connection."""


class _InMemoryParser(MultiPartParser):
    """Starlette's parser, which spools large files to disk, told never to: the limit is ours."""

    spool_max_size = sys.maxsize


class Uploads:
    """Bytes of all uploads that are held in memory: read, waiting, or being decoded."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.held_bytes = 0

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Callable[[int], None]]:
        """Yields what notes so many bytes more of one upload; raises Overloaded where there is no room."""
        mine = 0

        def take(size: int) -> None:
            nonlocal mine
            if self.held_bytes + size > self._max_bytes:
                raise Overloaded(f"{self.held_bytes:,} bytes of uploads are held; try again in a moment")
            mine, self.held_bytes = mine + size, self.held_bytes + size

        try:
            yield take
        finally:
            self.held_bytes -= mine


async def read_image(
    request: Request, max_bytes: int, take: Callable[[int], None] = lambda _: None
) -> bytes:
    """The multipart field `file`, or a raw image/* body; `take` is told of bytes as they come.

    Raises MalformedRequest, TooManyBytes, UnsupportedFormat, and what `take` does.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _multipart_file(request, max_bytes, take)
    if kind.startswith("image/") or kind == "application/octet-stream":
        return b"".join([chunk async for chunk in limited(request, max_bytes, take)])
    raise UnsupportedFormat(
        f"the content type is {kind or 'missing'}; send the photograph as multipart/form-data "
        f"in a field named '{FIELD}', or as the body with an image/* content type"
    )


async def limited(
    request: Request, max_bytes: int, take: Callable[[int], None], overhead: int = 0
) -> AsyncGenerator[bytes, None]:
    """The body's chunks; TooManyBytes as soon as they, or the announced length, pass the limit.

    `overhead`: bytes allowed above `max_bytes` for what frames the file in the body.
    """
    limit = max_bytes + overhead
    announced = request.headers.get("content-length", "")
    waits_for_consent = request.headers.get("expect", "").lower() == "100-continue"
    if announced.isdecimal() and int(announced) > limit:
        if not waits_for_consent:
            await _drain(request)
        raise TooManyBytes(f"the body is {int(announced):,} bytes; at most {max_bytes:,} are accepted")
    received = 0
    stream = request.stream()
    async for chunk in stream:
        received += len(chunk)
        if received > limit:
            await _drain(request, stream)
            raise TooManyBytes(f"the body is larger than the {max_bytes:,} bytes that are accepted")
        take(len(chunk))
        yield chunk


async def _drain(request: Request, stream: AsyncIterator[bytes] | None = None) -> None:
    until = time.monotonic() + _DRAIN_S
    async for _ in stream or request.stream():
        if time.monotonic() > until:
            return


async def _multipart_file(request: Request, max_bytes: int, take: Callable[[int], None]) -> bytes:
    stream = limited(request, max_bytes, take, overhead=_MULTIPART_BYTES)
    parser = _InMemoryParser(request.headers, stream, max_files=1, max_fields=8)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise MalformedRequest(f"the multipart body cannot be read: {error.message}") from error
    except KeyError as error:
        raise MalformedRequest("the multipart content type names no boundary") from error
    try:
        upload = form.get(FIELD)
        if not isinstance(upload, UploadFile):
            raise MalformedRequest(f"there is no file in the multipart field '{FIELD}'")
        data = await upload.read()
    finally:
        await form.close()
    if len(data) > max_bytes:
        raise TooManyBytes(f"the file is {len(data):,} bytes; at most {max_bytes:,} are accepted")
    return data
