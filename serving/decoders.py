"""Decoding in processes of their own, so that a picture that breaks its decoder costs one answer.

    gateway, scorer ── where the bytes are ──> serving.decoder, a process
                    <── the square, or why there is none ──

Each worker has one picture at a time: when it dies, or takes too long and is killed, it is known whose
fault that was, and the others go on.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import LifoQueue
from typing import Final

import numpy as np

from serving.contract import CHANNELS, RESIZE_SIZE
from serving.decoder import (
    DONE,
    FAILED,
    READY,
    SQUARE_BYTES,
    Bounds,
    Failure,
    Source,
    received,
    send,
)
from serving.errors import Overloaded, ServingError, Stopping
from serving.preprocess import Pixels

START_TIMEOUT_S: Final = 60.0
"""Until a worker has imported what it needs; usually a tenth of a second."""

_ENVIRONMENT: Final = {
    "OPENBLAS_NUM_THREADS": "1",  # should anything need NumPy: no threads
    # One heap, and large blocks outside it: what a large picture took is given back after it.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4194304",
    "MALLOC_TRIM_THRESHOLD_": "16777216",
}


class Decoders:
    """A fixed number of workers; `decode` may be called from as many threads."""

    def __init__(self, workers: int, bounds: Bounds | None = None) -> None:
        self.workers = workers
        self._idle: LifoQueue[_Worker] = LifoQueue()
        self._all = [_Worker(bounds or Bounds()) for _ in range(workers)]
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
                send(pipe, pickle.dumps(source), until_s)
                return parsed(received(pipe, 1 + SQUARE_BYTES, until_s))
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
                self._greeted = received(pipe, 1, time.monotonic() + START_TIMEOUT_S) == READY
        except OSError as error:
            self._lost()
            raise Overloaded("no decoder could be started; try again in a moment") from error
        return pipe

    def _start(self) -> socket.socket:
        if self._pipe is not None:
            return self._pipe
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):  # a square fits in, if the system lets it
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * SQUARE_BYTES)
        code = f"from serving.decoder import Bounds, work; work({theirs.fileno()}, {self._bounds!r})"
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


def parsed(answer: bytearray) -> Pixels | Failure:
    """Raises ValueError for what no worker of ours says."""
    kind, said = answer[:1], memoryview(answer)[1:]
    if kind == DONE:
        return np.frombuffer(said, np.uint8).reshape((RESIZE_SIZE, RESIZE_SIZE, CHANNELS))
    reason, separator, detail = str(said, "utf-8").partition("\n")
    if kind != FAILED or not separator:
        raise ValueError("no answer of a decoder")
    return Failure(reason, detail)
