"""Decoding in processes of their own, so that a picture that breaks its decoder costs one row.

Each worker has one file at a time: when it dies, or takes too long and is killed, it is known whose
fault that was, and the others go on.
"""

from __future__ import annotations

import contextlib
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import LifoQueue
from typing import Final

import numpy as np

from serving.contract import CHANNELS, RESIZE_SIZE
from serving.errors import ServingError, TooManyBytes, TooManyPixels, UndecodableImage, UnsupportedFormat
from serving.preprocess import Pixels, decode_square
from serving.sources import Item

MAX_BYTES: Final = 100_000_000
MAX_MEMORY_BYTES: Final = 4_000_000_000
TIMEOUT_S: Final = 30.0

_REASONS: Final[dict[type[ServingError], str]] = {
    TooManyBytes: "too_many_bytes",
    TooManyPixels: "too_many_pixels",
    UnsupportedFormat: "not_an_image",
    UndecodableImage: "undecodable",
}
_ADDRESS: Final = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclass(frozen=True)
class Failure:
    """Why a file has no answer: one of a few short codes, and a sentence."""

    reason: str
    detail: str


class Decoders:
    """A fixed number of workers; `decode` may be called from as many threads."""

    def __init__(self, workers: int, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._idle: LifoQueue[_Worker] = LifoQueue()
        self._all = [_Worker() for _ in range(workers)]
        for worker in self._all:
            self._idle.put(worker)

    def decode(self, item: Item) -> Pixels | Failure:
        """The file as uint8 [256, 256, 3], as `serving.preprocess.decode_square` gives it. Blocks."""
        worker = self._idle.get()
        try:
            return worker.decode(item, self._timeout_s)
        finally:
            self._idle.put(worker)

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        return [worker.process.pid for worker in self._all if worker.process is not None]

    def close(self) -> None:
        """End the workers."""
        for worker in self._all:
            worker.end()


class _Worker:
    """One process, started when it is needed, and again after it was lost."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def decode(self, item: Item, timeout_s: float) -> Pixels | Failure:
        try:
            pipe = self._started()
            pipe.send(item)
            if not pipe.poll(timeout_s):
                self.end()
                return Failure("decode_timeout", f"not decoded within {timeout_s:g} s")
            answer: bytes | Failure = pipe.recv()
        except (EOFError, OSError):
            status = self.end()
            return Failure("decoder_crashed", f"its decoder died with status {status}")
        if isinstance(answer, Failure):
            return answer
        return np.frombuffer(answer, np.uint8).reshape(RESIZE_SIZE, RESIZE_SIZE, CHANNELS)

    def end(self) -> int | None:
        process, self.process = self.process, None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(0.5)  # it ends by itself when its pipe is closed, unless it hangs
        process.kill()
        return process.wait()

    def _started(self) -> Connection:
        if self._pipe is None:
            self._pipe, theirs = Pipe()
            code = f"from serving.decoders import work; work({theirs.fileno()})"
            # Not multiprocessing's own processes: those import the main program again in each.
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).parent.parent,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches the parent, which ends them
            )
            theirs.close()
        return self._pipe


def work(descriptor: int) -> None:
    """A worker's life: an Item in, the square's bytes or a Failure out, until the pipe is closed."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe = Connection(descriptor)
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(decoded(pipe.recv()))


def decoded(item: Item) -> bytes | Failure:
    """In the calling process; every error becomes a Failure."""
    try:
        data = item.read(MAX_BYTES + 1)
        if not data:
            return Failure("empty", "the file is empty")
        if len(data) > MAX_BYTES:
            raise TooManyBytes(f"more than {MAX_BYTES:,} bytes")
        return decode_square(data).tobytes()
    except ServingError as error:
        return Failure(_REASONS[type(error)], _steady(str(error)))
    except MemoryError:
        return Failure("out_of_memory", f"more than {MAX_MEMORY_BYTES / 1e9:g} GB of memory")
    except OSError as error:
        return Failure("unreadable", error.strerror or _steady(str(error)))
    except Exception as error:  # noqa: BLE001  a row is owed for every file
        return Failure("decoder_crashed", _steady(f"{type(error).__name__}: {error}"))


def _steady(text: str) -> str:
    """Without what differs from one run to the next."""
    return _ADDRESS.sub("", " ".join(text.split()))
