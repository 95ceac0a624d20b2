"""A decoder: a process that holds Pillow and little else, and makes squares of files until it is told to end.

It is bounded in time and memory, has none of our settings, and says bytes and words, never a pickle: whoever
takes it over by a picture has no way back from there.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import re
import resource
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from PIL import AvifImagePlugin, Image

from serving.contract import CHANNELS, RESIZE_SIZE
from serving.errors import (
    DecoderCrashed,
    DecoderOutOfMemory,
    DecodeTimeout,
    ServingError,
    TooManyBytes,
    TooManyPixels,
    UndecodableImage,
    UnsupportedFormat,
)
from serving.pictures import DEFAULT_MAX_PIXELS, square_picture

SQUARE_BYTES: Final = RESIZE_SIZE * RESIZE_SIZE * CHANNELS
READY, DONE, FAILED = b"r", b"d", b"f"
"""What an answer begins with."""

_BYTES_PER_PIXEL: Final = 20
"""Of memory: 50 megapixels take 16.5 in lossless WebP, 10.8 in Lab TIFF, 11 in AVIF, 9 in PNG, 3 in JPEG."""
_SPARE_BYTES: Final = 100_000_000
_REASONS: Final[dict[type[ServingError], str]] = {
    TooManyBytes: "too_many_bytes",
    TooManyPixels: "too_many_pixels",
    UnsupportedFormat: "not_an_image",
    UndecodableImage: "undecodable",
    DecodeTimeout: "decode_timeout",
    DecoderCrashed: "decoder_crashed",
    DecoderOutOfMemory: "out_of_memory",
}
_ERRORS: Final = {reason: error for error, reason in _REASONS.items()} | {"empty": UndecodableImage}
_CRASHED: Final = "the decoder broke on this image; save it again, or send another file"
_ADDRESS: Final = re.compile(r" at 0x[0-9a-fA-F]+")

_LENGTH: Final = struct.Struct("!Q")
_MAX_WORDS: Final = 2000


class Source(Protocol):
    """Where a worker finds a file's bytes; it goes there as a pickle."""

    def read(self, limit: int, /) -> bytes:
        """At most `limit` bytes; raises OSError where they cannot be read."""


@dataclass(frozen=True)
class Upload:
    """A file whose bytes are here already."""

    data: bytes

    def read(self, limit: int, /) -> bytes:
        """See `Source`."""
        return self.data[:limit]


@dataclass(frozen=True)
class Bounds:
    """Of one picture's decoding."""

    timeout_s: float = 30.0
    max_bytes: int = 100_000_000
    max_pixels: int = DEFAULT_MAX_PIXELS
    max_memory_bytes: int | None = None

    @property
    def memory_bytes(self) -> int:
        """What a worker may take beyond what it has when idle; by itself enough for what is accepted."""
        enough = _BYTES_PER_PIXEL * self.max_pixels + 4 * self.max_bytes + _SPARE_BYTES
        return enough if self.max_memory_bytes is None else self.max_memory_bytes


@dataclass(frozen=True)
class Failure:
    """Why a file has no answer: one of a few short codes, and a sentence."""

    reason: str
    detail: str

    @property
    def error(self) -> ServingError:
        """As a request is told; of a crash nothing that speaks of our insides."""
        error = _ERRORS.get(self.reason, DecoderCrashed)
        return error(_CRASHED if error is DecoderCrashed else self.detail)


# --- what goes through the pipe ------------------------------------------------------------------


def send(pipe: socket.socket, message: bytes, until_s: float | None = None) -> None:
    """One message; raises TimeoutError, or another OSError where nobody is there."""
    pipe.settimeout(_left(until_s))
    # Together, so that the other side wakes once. The buffer is empty: it takes the length whole.
    sent = pipe.sendmsg((_LENGTH.pack(len(message)), message)) - _LENGTH.size
    pipe.settimeout(_left(until_s))
    pipe.sendall(memoryview(message)[sent:])


def received(pipe: socket.socket, most: int, until_s: float | None = None) -> bytearray:
    """One message; raises TimeoutError, or another OSError where it is too long or nobody is there."""
    (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size, until_s))
    if length > most:
        raise ConnectionError(f"a message of {length:,} bytes")
    return _exactly(pipe, length, until_s)


def _exactly(pipe: socket.socket, count: int, until_s: float | None) -> bytearray:
    data = bytearray(count)
    rest = memoryview(data)
    while rest:
        pipe.settimeout(_left(until_s))
        got = pipe.recv_into(rest)
        if not got:
            raise ConnectionError("the other side has ended")
        rest = rest[got:]
    return data


def _left(until_s: float | None) -> float | None:
    # 0 would mean not to wait at all, which is told by another error than the end of the time.
    return None if until_s is None else max(1e-6, until_s - time.monotonic())


def worded(answer: bytes | Failure) -> bytes:
    """A square's bytes, or a failure, as they go through the pipe."""
    if isinstance(answer, bytes):
        return DONE + answer
    return FAILED + f"{answer.reason}\n{answer.detail[:_MAX_WORDS]}".encode()


# --- the worker's side ----------------------------------------------------------------------------


def work(descriptor: int, bounds: Bounds) -> None:
    """A worker's life: a Source in, the square's bytes or a Failure out, until the pipe is closed."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all by systemd; ours decides when we end
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # else one a core, each with memory of its own
    _warm_up()
    _bound_memory(bounds.memory_bytes)
    pipe = socket.socket(fileno=descriptor)
    with contextlib.suppress(OSError):
        # libtiff writes what it thinks of a file there, into the middle of our log.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        send(pipe, READY)
        while True:
            source = pickle.loads(received(pipe, 2 * bounds.max_bytes + _SPARE_BYTES))
            # Should nobody be left to kill a worker that hangs.
            signal.alarm(math.ceil(bounds.timeout_s) + 1)
            answer = worded(decoded(source, bounds))
            signal.alarm(0)
            del source  # nobody waits for its memory, nor should it wait here
            send(pipe, answer)


def _warm_up() -> None:
    """What Pillow imports with its first file, and with the first that is none, is imported now."""
    Image.init()
    file = io.BytesIO()
    Image.new("RGB", (2 * RESIZE_SIZE, 2 * RESIZE_SIZE)).save(file, "JPEG")
    square_picture(file.getvalue())


def _bound_memory(spare_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # no /proc, or a lower limit that we were given
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + spare_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def decoded(source: Source, bounds: Bounds = Bounds()) -> bytes | Failure:
    """In the calling process; every error becomes a Failure."""
    data = None
    try:
        data = source.read(bounds.max_bytes + 1)
        if len(data) > bounds.max_bytes:
            raise TooManyBytes(f"more than {bounds.max_bytes:,} bytes")
        return square_picture(data, bounds.max_pixels).tobytes()
    except ServingError as error:
        return Failure("empty" if data == b"" else _REASONS[type(error)], _steady(str(error)))
    except MemoryError:
        return Failure("out_of_memory", f"decoding it takes over {bounds.memory_bytes / 1e9:.1f} GB")
    except OSError as error:
        return Failure("unreadable", error.strerror or _steady(str(error)))
    except Exception as error:  # noqa: BLE001  a row is owed for every file
        return Failure("decoder_crashed", _steady(f"{type(error).__name__}: {error}"))


def _steady(text: str) -> str:
    """Without what differs from one run to the next."""
    return _ADDRESS.sub("", " ".join(text.split()))
