"""The upload out of a request: bytes counted as they arrive, nothing written to disk."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from serving.errors import MalformedRequest, TooManyBytes, UnsupportedFormat

FIELD: Final = "file"
_MULTIPART_BYTES: Final = 10_000
"""Room for boundaries and part headers around the file."""

_DRAIN_S: Final = 5.0
"""How long the rest of a refused body is read and dropped, so that the client, still sending,
sees the answer and not a reset connection."""


class _InMemoryParser(MultiPartParser):
    """Starlette's parser, which spools large files to disk, told never to: the limit is ours."""

    spool_max_size = sys.maxsize


async def read_image(request: Request, max_bytes: int) -> bytes:
    """The multipart field `file`, or a raw image/* body.

    Raises MalformedRequest, TooManyBytes or UnsupportedFormat.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _multipart_file(request, max_bytes)
    if kind.startswith("image/") or kind == "application/octet-stream":
        return b"".join([chunk async for chunk in limited(request, max_bytes)])
    raise UnsupportedFormat(
        f"the content type is {kind or 'missing'}; send the photograph as multipart/form-data "
        f"in a field named '{FIELD}', or as the body with an image/* content type"
    )


async def limited(request: Request, max_bytes: int, overhead: int = 0) -> AsyncGenerator[bytes, None]:
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
        yield chunk


async def _drain(request: Request, stream: AsyncIterator[bytes] | None = None) -> None:
    until = time.monotonic() + _DRAIN_S
    async for _ in stream or request.stream():
        if time.monotonic() > until:
            return


async def _multipart_file(request: Request, max_bytes: int) -> bytes:
    stream = limited(request, max_bytes, overhead=_MULTIPART_BYTES)
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
