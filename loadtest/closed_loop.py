"""A closed loop: so many clients, each sends its next photograph when it has its answer.

Bodies are encoded beforehand and sent by http.client over kept connections, so that the generator
takes as little as possible of the cores that it shares with the server.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from dataclasses import dataclass, field

BOUNDARY = "photograph"
HEADERS = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
SETTLED_AFTER_S = 60.0
ERRORS = (OSError, http.client.HTTPException, ValueError, AttributeError)
"""What http.client raises in a thread whose connection another one closes."""


def multipart(photograph: bytes) -> bytes:
    """The request's body with the photograph in the field `file`."""
    head = 'Content-Disposition: form-data; name="file"; filename="photo.jpg"\r\nContent-Type: image/jpeg'
    return f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + photograph + f"\r\n--{BOUNDARY}--\r\n".encode()


@dataclass(frozen=True)
class Load:
    """What one load found. `latencies_ms` are of the answers in the window alone."""

    clients: int
    images_per_s: float
    latencies_ms: list[float]
    refused: int
    degraded: int


BURST_S = 0.02
"""Answers of one batch come within this time."""


@dataclass
class Window:
    """Answers as they come. It opens when every client has had its first, and ends when `seconds` have
    passed and every client has had another.

    So it measures a queue that is as long as it will be, and whole turns of it: a server that answers
    all clients at about the same time (one that works on all of them at once) would be measured by
    chance otherwise. Answers that come in one burst (a batching server's) stay together: those with
    the one that opens it are before it, those with the one that ends it are in it.
    """

    clients: int
    seconds: float
    opened: float | None = None
    ended: float | None = None
    latencies_ms: list[float] = field(default_factory=list)
    refused: int = 0
    degraded: int = 0
    _waiting: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._waiting = set(range(self.clients))

    def note(self, client: int, sent: float, now: float, status: int, *, degraded: bool) -> None:
        """An answer; those before the window are not counted, and nothing after its end."""
        self._waiting.discard(client)
        if self.opened is None:
            if not self._waiting:
                self.opened, self._waiting = now, set(range(self.clients))
            return
        if now <= self.opened + BURST_S or (self.ended is not None and now > self.ended + BURST_S):
            return
        if status == 200:
            self.latencies_ms.append(1000 * (now - sent))
            self.degraded += degraded
        else:
            self.refused += 1
        if self.ended is None and not self._waiting and now >= self.opened + self.seconds:
            self.ended = now

    def load(self) -> Load:
        """Raises RuntimeError if no answer ended it."""
        if self.opened is None or self.ended is None:
            raise RuntimeError(f"{self.clients} clients had no answers for {SETTLED_AFTER_S:g} s")
        rate = len(self.latencies_ms) / (self.ended - self.opened)
        return Load(self.clients, rate, self.latencies_ms, self.refused, self.degraded)


def closed_loop(url: str, path: str, bodies: list[bytes], clients: int, seconds: float) -> Load:
    """Load http://HOST:PORT for about `seconds`, after each client's first answer; requests that are
    still under way then are abandoned."""
    window, lock = Window(clients, seconds), threading.Lock()
    ended, over = threading.Event(), threading.Event()
    place = url.removeprefix("http://")
    connections = [http.client.HTTPConnection(place, timeout=SETTLED_AFTER_S) for _ in range(clients)]

    def client(number: int) -> None:
        connection, index = connections[number], number
        while not over.is_set():
            sent = time.perf_counter()
            try:
                connection.request("POST", path, bodies[index % len(bodies)], HEADERS)
                answer = connection.getresponse()
                body = answer.read()
            except ERRORS:
                if over.is_set():
                    return
                connection.close()
                status, body = 0, b""
            else:
                status = answer.status
            with lock:
                degraded = b'"degraded":true' in body
                window.note(number, sent, time.perf_counter(), status, degraded=degraded)
                if window.ended is not None:
                    ended.set()
            if status != 200:
                over.wait(0.05)
            index += clients

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    if ended.wait(SETTLED_AFTER_S + seconds):
        time.sleep(BURST_S)
    over.set()
    for connection in connections:
        _break(connection)
    for thread in threads:
        thread.join(5)
    return window.load()


def _break(connection: http.client.HTTPConnection) -> None:
    """Wake the thread that waits on it: closing alone would leave it waiting."""
    with contextlib.suppress(OSError):
        if connection.sock is not None:
            connection.sock.shutdown(2)
    connection.close()
