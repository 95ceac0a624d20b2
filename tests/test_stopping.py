"""The end of a gateway: SIGTERM, what is under way, what hangs; and two restarted in turn without a loss."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from processes import Gateway, gateway
from support import FakeBackend, encoded, picture, tiny_repository

from serving.server import serve
from serving.settings import Settings

PHOTO = encoded(picture(41))
JPEG = {"content-type": "image/jpeg"}
HEAD = b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-type: image/jpeg\r\ncontent-length: %d\r\n\r\n"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_repository(tmp_path_factory.mktemp("repository"))


def until(true: Callable[[], bool], timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def answered(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_while_it_drains_it_is_not_ready_lives_answers_and_closes_connections(repository: Path) -> None:
    with gateway(repository, drain_delay_s=60) as server, httpx.Client(base_url=server.url) as client:
        before = client.get("/readyz")
        assert before.status_code == 200 and before.headers.get("connection") != "close"
        server.terminate()
        until(lambda: client.get("/readyz").status_code == 503)
        ready = client.get("/readyz").json()
        assert ready["title"] == "Stopping" and "another" in ready["detail"]
        for answer in (client.get("/livez"), client.post("/classify", content=PHOTO, headers=JPEG)):
            assert answer.status_code == 200
            assert answer.headers["connection"] == "close"
        server.process.send_signal(signal.SIGINT)  # who sits there need not wait
        assert server.end() == 130


def test_a_request_under_way_is_answered_after_sigterm(repository: Path) -> None:
    with gateway(repository) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(HEAD % len(PHOTO) + PHOTO[:100])
            assert httpx.get(f"{server.url}/livez").status_code == 200  # by now it has begun
            server.terminate()
            until(lambda: refuses(server.port))
            assert server.process.poll() is None, "it waits for the rest"
            connection.sendall(PHOTO[100:])
            answer = answered(connection)
        assert answer.startswith(b"HTTP/1.1 200") and b"predictions" in answer
        assert b"connection: close" in answer.lower()
        assert server.end() == 0


def test_whatever_hangs_it_ends_in_bounded_time_with_0(repository: Path) -> None:
    """Idle connections, half a head, half an upload, an answer that nobody reads."""
    with gateway(repository, request_timeout_s=1) as server, ExitStack() as held:

        def connected() -> socket.socket:
            return held.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))

        silent, kept, head, upload, deaf = (connected() for _ in range(5))
        kept.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert kept.recv(12) == b"HTTP/1.1 200"
        head.sendall(b"POST /classify HTTP/1.1\r\nhost:")
        upload.sendall(HEAD % 1_000_000 + PHOTO[:100])
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nhost: x\r\n\r\n")
        assert silent.fileno() > 0
        assert httpx.get(f"{server.url}/livez").status_code == 200
        server.terminate()
        assert server.end(12) == 0
    assert not any("Traceback" in line for line in server.log), "".join(server.log)


class Loading(FakeBackend):
    """A model that takes for ever to load; the process is told to end meanwhile."""

    closed = False

    async def start(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(3600)

    async def close(self) -> None:
        self.closed = True


def test_a_sigterm_while_the_model_is_loaded_ends_it_and_nothing_is_served() -> None:
    backend, urls = Loading(), list[str]()
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        asyncio.run(serve(Settings(port=0), backend, urls.append))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert backend.closed and not urls


# --- two, restarted in turn ----------------------------------------------------------------------


class Balancer:
    """Layer 4, as plain as they come: bytes to and fro, backends that /readyz calls ready, taken in turn.

    A connection that a backend refuses is tried at the next; what a backend breaks is broken.
    """

    CHECK_S = 0.1

    def __init__(self) -> None:
        self.backends: list[int] = []
        self.ready: set[int] = set()
        self.carried: dict[int, int] = {}
        self._next = 0

    @contextmanager
    def running(self) -> Iterator[str]:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()

        def run(work: object) -> object:
            return asyncio.run_coroutine_threadsafe(work, loop).result(20)  # type: ignore[arg-type]

        server = run(asyncio.start_server(self._carry, "127.0.0.1", 0))
        assert isinstance(server, asyncio.Server)
        checks = asyncio.run_coroutine_threadsafe(self._check(), loop)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            checks.cancel()
            loop.call_soon_threadsafe(server.close)
            run(_end_all())
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _check(self) -> None:
        while True:
            for port in list(self.backends):
                (self.ready.add if await _is_ready(port) else self.ready.discard)(port)
            self.ready &= set(self.backends)
            await asyncio.sleep(self.CHECK_S)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(100):
            ports = sorted(self.ready)
            self._next += 1
            if ports:
                port = ports[self._next % len(ports)]
                with suppress(ConnectionError):
                    there = await asyncio.open_connection("127.0.0.1", port)
                    self.carried[port] = self.carried.get(port, 0) + 1
                    await asyncio.gather(_pipe(reader, there[1]), _pipe(there[0], writer))
                    return
            await asyncio.sleep(0.02)
        writer.close()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _is_ready(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /readyz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        status = await asyncio.wait_for(reader.read(12), 2)
        writer.close()
    except (OSError, TimeoutError):
        return False
    return status == b"HTTP/1.1 200"


async def _end_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Clients:
    """Clients that ask without a pause, half of them on connections that they keep; each failure is kept."""

    def __init__(self, url: str, count: int = 4) -> None:
        self._url, self._ended = url, threading.Event()
        self.answers, self.failures = 0, list[str]()
        self._threads = [threading.Thread(target=self._ask, args=(n % 2 == 0,)) for n in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(30)

    def _ask(self, keep: bool) -> None:
        headers = JPEG | ({} if keep else {"connection": "close"})
        with httpx.Client(base_url=self._url, timeout=20) as client:
            while not self._ended.is_set():
                try:
                    answer = client.post("/classify?crops=center", content=PHOTO, headers=headers)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    continue
                if answer.status_code == 200 and answer.json()["predictions"]:
                    self.answers += 1
                else:
                    self.failures.append(answer.text)

    def until_more(self, count: int = 20) -> None:
        wanted = self.answers + count
        until(lambda: self.answers >= wanted)


def restarted_in_turn(repository: Path, balancer: Balancer, clients: Clients, drain_delay_s: float) -> None:
    with ExitStack() as stack:

        def start() -> Gateway:
            server = stack.enter_context(gateway(repository, drain_delay_s=drain_delay_s))
            balancer.backends.append(server.port)
            until(lambda: server.port in balancer.ready)
            return server

        old = [start(), start()]
        with clients:
            for server in old:
                clients.until_more()
                start()
                server.terminate()
                assert server.end() == 0
                balancer.backends.remove(server.port)
            clients.until_more()
        assert all(balancer.carried.get(server.port, 0) > 0 for server in old)


def test_two_gateways_restarted_in_turn_behind_a_plain_balancer_lose_nothing(repository: Path) -> None:
    balancer = Balancer()
    with balancer.running() as url:
        clients = Clients(url)
        restarted_in_turn(repository, balancer, clients, drain_delay_s=1)
    assert clients.failures == []
    assert clients.answers >= 60
    assert len(balancer.carried) == 4, "every one of the four processes carried some"


def test_the_same_with_processes_that_are_killed_is_noticed(repository: Path) -> None:
    """So that the test above could fail."""
    balancer = Balancer()
    with balancer.running() as url, gateway(repository) as one, gateway(repository) as two:
        balancer.backends += [one.port, two.port]
        until(lambda: len(balancer.ready) == 2)
        with Clients(url) as clients:
            clients.until_more()
            one.process.kill()
            until(lambda: bool(clients.failures))
            clients.until_more()
