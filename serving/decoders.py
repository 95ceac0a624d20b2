"""Decoding in processes of their own, so that a picture that breaks its decoder costs one answer.

    gateway, scorer ── what to read ──> worker: serving.preprocess alone, bounded in time and memory
                    <── the square, or why there is none ──

Each worker has one picture at a time: when it dies, or takes too long and is killed, it is known whose
fault that was, and the others go on. What a worker answers is taken for bytes and words, never for a
pickle: whoever takes over a decoder has a process without our settings, and no way back into this one.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from queue import LifoQueue
from typing import Final, Protocol

import numpy as np
from PIL import AvifImagePlugin

from serving.contract import CHANNELS, RESIZE_SIZE
from serving.errors import (
    DecoderCrashed,
    DecoderOutOfMemory,
    DecodeTimeout,
    Overloaded,
    ServingError,
    Stopping,
    TooManyBytes,
    TooManyPixels,
    UndecodableImage,
    UnsupportedFormat,
)
from serving.preprocess import DEFAULT_MAX_PIXELS, Pixels, decode_square

START_TIMEOUT_S: Final = 60.0
"""Until a worker has imported what it needs; usually a fifth of a second."""

_BYTES_PER_PIXEL: Final = 20
"""Of memory: 50 megapixels take 16.5 in lossless WebP, 10.8 in Lab TIFF, 9 in PNG and AVIF, 3 in JPEG."""
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
_SQUARE: Final = (RESIZE_SIZE, RESIZE_SIZE, CHANNELS)
_MAX_ANSWER_BYTES: Final = math.prod(_SQUARE) + 1
_MAX_WORDS: Final = 2000
_READY, _DONE, _FAILED = b"r", b"d", b"f"

_ENVIRONMENT: Final = {
    "OPENBLAS_NUM_THREADS": "1",  # NumPy would start threads that nothing here uses
    # One heap, and large blocks outside it: what a large picture took is given back after it.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4194304",
    "MALLOC_TRIM_THRESHOLD_": "16777216",
}


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


class Decoders:
    """A fixed number of workers; `decode` may be called from as many threads."""

    def __init__(self, workers: int, bounds: Bounds = Bounds()) -> None:
        self.workers = workers
        self._idle: LifoQueue[_Worker] = LifoQueue()
        self._all = [_Worker(bounds) for _ in range(workers)]
        for worker in reversed(self._all):  # the first is taken first
            self._idle.put(worker)

    def start(self, count: int | None = None) -> None:
        """Start so many, or all, without waiting until they are ready; by itself each starts when needed."""
        for worker in self._all[:count]:
            worker.start()

    def decode(self, source: Source) -> Pixels | Failure:
        """The file as uint8 [256, 256, 3], as `serving.preprocess.decode_square` gives it. Blocks.

        Raises Overloaded where no worker can be started, Stopping after `close`.
        """
        worker = self._idle.get()
        try:
            return worker.decode(source)
        finally:
            self._idle.put(worker)

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        return [process.pid for worker in self._all if (process := worker.process) is not None]

    def close(self) -> None:
        """End the workers at once; whoever waits for one is told Stopping."""
        for worker in self._all:
            worker.kill()
        for worker in self._all:
            worker.end()


class _Worker:
    """One process, started when it is needed, and again when it was lost."""

    def __init__(self, bounds: Bounds) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._bounds = bounds
        self._pipe: socket.socket | None = None
        self._greeted = self._closed = False
        self._lock = threading.Lock()

    def start(self) -> None:
        with self._lock:
            self._start()

    def decode(self, source: Source) -> Pixels | Failure:
        with self._lock:
            pipe, until_s = self._ready(), time.monotonic() + self._bounds.timeout_s
            try:
                _send(pipe, pickle.dumps(source), until_s)
                return parsed(_received(pipe, _MAX_ANSWER_BYTES, until_s))
            except TimeoutError:
                failure = Failure("decode_timeout", f"not decoded within {self._bounds.timeout_s:g} s")
                self._lost()
            except (OSError, ValueError):
                failure = Failure("decoder_crashed", f"its decoder died with status {self._lost()}")
            with contextlib.suppress(ServingError):  # whoever comes next is told
                self._start()
            return failure

    def kill(self) -> None:
        """For ever; from any thread, also while another waits for its answer."""
        self._closed = True
        if self.process is not None:
            self.process.kill()

    def end(self) -> None:
        with self._lock:
            self._end()

    def _ready(self) -> socket.socket:
        """A worker that has greeted. One that was lost while it had nothing to do costs nobody an answer."""
        if self.process is not None and self.process.poll() is not None:
            self._end()
        pipe = self._start()
        try:
            if not self._greeted:
                self._greeted = _received(pipe, 1, time.monotonic() + START_TIMEOUT_S) == _READY
        except OSError as error:
            self._lost()
            raise Overloaded("no decoder could be started; try again in a moment") from error
        return pipe

    def _start(self) -> socket.socket:
        if self._pipe is not None:
            return self._pipe
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):  # a square fits in, if the system lets it
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _MAX_ANSWER_BYTES)
        code = f"from serving.decoders import Bounds, work; work({theirs.fileno()}, {self._bounds!r})"
        try:
            # Not multiprocessing's own processes: those import the main program again in each.
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).parent.parent,
                # Our settings, with what is secret among them, are none of a decoder's business.
                env={k: v for k, v in os.environ.items() if not k.startswith("ALEXNET_")} | _ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches the parent, which ends them
            )
        except OSError as error:
            ours.close()
            raise Overloaded("no decoder could be started; try again in a moment") from error
        finally:
            theirs.close()
        self._pipe, self._greeted = ours, False
        if self._closed:  # asked after the process is known, so that `kill` or this sees it
            self._lost()
        return ours

    def _lost(self) -> int | None:
        """Its status; raises Stopping where it was we who ended it."""
        status = self._end()
        if self._closed:
            raise Stopping("decoding has ended here")
        return status

    def _end(self) -> int | None:
        """Kill it; its status, where it had died by itself the one it died with."""
        process, self.process = self.process, None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if process is None:
            return None
        process.kill()
        return process.wait()


# --- what goes through the pipe -------------------------------------------------------------------


def _send(pipe: socket.socket, message: bytes, until_s: float | None = None) -> None:
    pipe.settimeout(_left(until_s))
    # Together, so that the other side wakes once. The buffer is empty: it takes the length whole.
    sent = pipe.sendmsg((_LENGTH.pack(len(message)), message)) - _LENGTH.size
    pipe.settimeout(_left(until_s))
    pipe.sendall(memoryview(message)[sent:])


def _received(pipe: socket.socket, most: int, until_s: float | None = None) -> bytearray:
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


def parsed(answer: bytearray) -> Pixels | Failure:
    """Raises ValueError for what no worker of ours says."""
    kind, said = answer[:1], memoryview(answer)[1:]
    if kind == _DONE:
        return np.frombuffer(said, np.uint8).reshape(_SQUARE)
    reason, separator, detail = str(said, "utf-8").partition("\n")
    if kind != _FAILED or not separator:
        raise ValueError("no answer of a decoder")
    return Failure(reason, detail)


def worded(answer: bytes | Failure) -> bytes:
    if isinstance(answer, bytes):
        return _DONE + answer
    return _FAILED + f"{answer.reason}\n{answer.detail[:_MAX_WORDS]}".encode()


# --- the worker's side ----------------------------------------------------------------------------


def work(descriptor: int, bounds: Bounds) -> None:
    """A worker's life: a Source in, the square's bytes or a Failure out, until the pipe is closed."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all by systemd; ours decides when we end
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # else one a core, each with memory of its own
    _bound_memory(bounds.memory_bytes)
    pipe = socket.socket(fileno=descriptor)
    with contextlib.suppress(OSError):
        # libtiff writes what it thinks of a file there, into the middle of our log.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        _send(pipe, _READY)
        while True:
            source = pickle.loads(_received(pipe, 2 * bounds.max_bytes + _SPARE_BYTES))
            # Should nobody be left to kill a worker that hangs.
            signal.alarm(math.ceil(bounds.timeout_s) + 1)
            answer = worded(decoded(source, bounds))
            signal.alarm(0)
            del source  # nobody waits for its memory, nor should it wait here
            _send(pipe, answer)


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
        return decode_square(data, bounds.max_pixels).tobytes()
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
