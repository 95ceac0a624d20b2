"""Several gateways on one port: a parent that holds the sockets, starts them and replaces who dies.

    alexnet serve --workers 2 ── sockets, signals, the folder of the metrics; no model, no request
      ├── worker 0 ── a gateway like any other, which accepts from the parent's sockets
      └── worker 1

They share the sockets themselves (not SO_REUSEPORT): connections that wait when a worker dies are
accepted by another. Workers are forked, so the parent must not have started a thread.
"""

from __future__ import annotations

import logging
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from serving.errors import MalformedRequest, ModelNotReady, ServingError

LASTING_S: Final = 10.0
"""A worker that served so long was well; the next is started at once."""
MAX_PAUSE_S: Final = 60.0
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_READY, _FAILED = b"+", b"-"
logger = logging.getLogger("alexnet.gateway")


@dataclass(frozen=True)
class Place:
    """What a worker is given: where it accepts and counts, and how it says that it is ready."""

    slot: int
    sockets: list[socket.socket]
    ops_sockets: list[socket.socket] | None
    metrics: Path
    lifeline: int
    """Readable once the parent is gone, however it ended."""
    ready: Callable[[str], None]


def listening(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to each of the host's addresses; to the first alone where any port is fine.

    Raises MalformedRequest if that cannot be.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in list(dict.fromkeys(found))[: None if port else 1]:
            sockets.append(socket.socket(family, kind, protocol))
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sockets[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sockets[-1].bind(address)
    except OSError as error:
        _close(sockets)
        raise MalformedRequest(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return sockets


@dataclass
class _Worker:
    """One process, and the pipe on which it says that it is ready, or why not; closed when it is dead."""

    pid: int
    pipe: int
    since_s: float
    said: bytes = b""
    is_ready: bool = False


class Workers:
    """`run` starts so many, calls `ready(what each said)` once, and returns after SIGTERM.

    `end_s`: a worker that is told to end has so long. A dead one is replaced at once, and if it lived
    shortly after a pause that doubles; none has been ready: that is an error and not tried again.
    """

    def __init__(
        self,
        count: int,
        work: Callable[[Place], None],
        ready: Callable[[list[str]], None],
        *,
        sockets: list[socket.socket],
        ops_sockets: list[socket.socket] | None = None,
        end_s: float = 60.0,
    ) -> None:
        self._count, self._work, self._ready, self._end_s = count, work, ready, end_s
        self._sockets, self._ops_sockets = sockets, ops_sockets
        self._running: dict[int, _Worker] = {}  # by slot
        self._due_s = dict.fromkeys(range(count), 0.0)  # when a slot is to be filled
        self._short_lives = dict.fromkeys(range(count), 0)
        self._signals: list[int] = []
        self._kill_s: float | None = None
        self._error: ServingError | None = None
        self._begun = False  # all were ready

    def run(self) -> None:
        """Raises ModelNotReady if a worker cannot be started, KeyboardInterrupt after Ctrl-C."""
        self._folder = Path(tempfile.mkdtemp(prefix="alexnet-metrics-"))
        self._lifeline = os.pipe()
        try:
            with selectors.DefaultSelector() as self._selector, self._signals_caught():
                self._supervise()
        finally:
            for end in self._lifeline:
                os.close(end)
            self._stop_accepting()
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._error:
            raise self._error
        if signal.SIGINT in self._signals:
            raise KeyboardInterrupt

    def _supervise(self) -> None:
        while self._running or self._due_s:
            now_s = time.monotonic()
            for slot in [slot for slot, due_s in self._due_s.items() if due_s <= now_s]:
                del self._due_s[slot]
                self._start(slot)
            waits_s = [due_s - now_s for due_s in self._due_s.values()]
            if self._kill_s is not None:
                waits_s.append(self._kill_s - now_s)
            for key, _ in self._selector.select(max(0.0, min(waits_s)) if waits_s else None):
                if key.data is None:
                    os.read(key.fd, 64)  # of the wakeup: the handler has noted which
                else:
                    self._hear(key.data)
            self._obey()

    def _start(self, slot: int) -> None:
        ours, theirs = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # none may meet our handlers in the child
        try:
            pid = os.fork()
            if pid == 0:
                self._be_worker(slot, theirs)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.close(theirs)
        self._running[slot] = _Worker(pid, ours, time.monotonic())
        self._selector.register(ours, selectors.EVENT_READ, slot)

    def _be_worker(self, slot: int, pipe: int) -> NoReturn:
        status = 1
        try:
            os.setsid()  # Ctrl-C reaches the parent, which tells us
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.close(self._lifeline[1])
            for worker in self._running.values():
                os.close(worker.pipe)
            self._selector.close()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

            def say(text: str, kind: bytes = _READY) -> None:
                os.write(pipe, kind + text.encode())

            place = Place(slot, self._sockets, self._ops_sockets, self._folder, self._lifeline[0], say)
            try:
                self._work(place)
                status = 0
            except ServingError as error:
                say(str(error), _FAILED)
        except KeyboardInterrupt:
            status = 130
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:  # noqa: BLE001  told, and the process ends with it
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(status)

    def _hear(self, slot: int) -> None:
        worker = self._running[slot]
        if said := os.read(worker.pipe, 65536):
            worker.said += said
            if said.startswith(_READY):
                worker.is_ready = True
                self._note_ready(slot)
            return
        self._selector.unregister(worker.pipe)
        os.close(worker.pipe)
        del self._running[slot]
        status = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
        for file in self._folder.glob(f"gauge_*_{slot}.db"):  # what it counted stays: the next goes on there
            file.unlink(missing_ok=True)
        if self._kill_s is None:
            self._lost(slot, worker, status)

    def _note_ready(self, slot: int) -> None:
        if self._begun:
            logger.info("worker %d is ready, process %d", slot, self._running[slot].pid)
        elif len(self._running) == self._count and all(each.is_ready for each in self._running.values()):
            self._begun = True
            self._ready([self._running[each].said[1:].decode() for each in range(self._count)])

    def _lost(self, slot: int, worker: _Worker, status: int) -> None:
        why = f"worker {slot} ended with status {status}"
        if worker.said.startswith(_FAILED):
            why = worker.said[1:].decode()
        if not self._begun:
            self._error = ModelNotReady(why)
            self._end()
            return
        now_s = time.monotonic()
        short = not worker.is_ready or now_s - worker.since_s < LASTING_S
        self._short_lives[slot] = self._short_lives[slot] + 1 if short else 0
        # At once the first time; then 1, 2, 4 ... s, so that one that cannot live costs the others little.
        lives = self._short_lives[slot]
        pause_s = min(MAX_PAUSE_S, 2.0 ** (lives - 2)) if lives > 1 else 0.0
        self._due_s[slot] = now_s + pause_s
        logger.warning("%s; replaced%s", why, f" in {pause_s:g} s" if pause_s else "")
        if not any(each.is_ready for each in self._running.values()) and not worker.is_ready:
            self._error = ModelNotReady(f"no worker is left: {why}")
            self._end()

    def _obey(self) -> None:
        if self._kill_s is None and self._signals:
            self._end()
        elif self._signals.count(signal.SIGINT) > 1:
            self._tell(signal.SIGINT)
        if self._kill_s is not None and time.monotonic() > self._kill_s and self._running:
            logger.error("%d workers do not end: killed", len(self._running))
            self._error = self._error or ModelNotReady("workers had to be killed")
            self._kill_s = time.monotonic() + self._end_s
            self._tell(signal.SIGKILL)

    def _end(self) -> None:
        """Whoever runs drains, and accepts until it does; nobody is started any more."""
        self._kill_s = time.monotonic() + self._end_s
        self._due_s.clear()
        self._stop_accepting()
        self._tell(signal.SIGTERM)

    def _stop_accepting(self) -> None:
        _close([*self._sockets, *(self._ops_sockets or [])])

    def _tell(self, number: int) -> None:
        for worker in self._running.values():
            os.kill(worker.pid, number)  # dead or not it has not been waited for: the number is its own

    @contextmanager
    def _signals_caught(self) -> Iterator[None]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for end in (ours, theirs):
                end.setblocking(False)
            self._selector.register(ours, selectors.EVENT_READ, None)
            wakeup = signal.set_wakeup_fd(theirs.fileno())
            before = {
                number: signal.signal(number, lambda number, _: self._signals.append(number))
                for number in _SIGNALS
            }
            try:
                yield
            finally:
                signal.set_wakeup_fd(wakeup)
                for number, handler in before.items():
                    signal.signal(number, handler)


def _close(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()
