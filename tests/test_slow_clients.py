"""Clients that are slow, endless or many: they lose their connections, and real ones are served."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

import httpx
import pytest
from processes import Gateway, gateway
from support import FakeBackend, encoded, picture, tiny_repository

Serve = Callable[..., AbstractContextManager[str]]
HEAD = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 100000\r\n"
JPEG = {"content-type": "image/jpeg"}


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A real gateway that waits a second for heads and bodies."""
    repository = tiny_repository(tmp_path_factory.mktemp("repository"))
    with gateway(repository, head_timeout_s=1, body_timeout_s=1) as running:
        yield running


@contextmanager
def connected(running: Gateway, count: int = 1) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=10))
            for _ in range(count)
        ]


def received(connection: socket.socket) -> bytes:
    """Everything until the server closes, or resets since we have sent more."""
    pieces = []
    with suppress(ConnectionError):
        while piece := connection.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def assert_served(running: Gateway) -> None:
    answer = httpx.post(f"{running.url}/classify", content=encoded(picture(1)), headers=JPEG, timeout=10)
    assert answer.status_code == 200


def test_clients_that_drip_lose_their_connections_and_real_ones_are_served(impatient: Gateway) -> None:
    with connected(impatient, 60) as connections:
        for number, connection in enumerate(connections):
            connection.sendall(b"G" if number % 2 else HEAD + b"\r\n\xff")
        assert_served(impatient)
        for letter in (b"E", b"T", b" ", b"/"):
            for number, connection in enumerate(connections):
                with suppress(ConnectionError):  # on a busy machine its time may be over already
                    connection.sendall(letter if number % 2 else b"x")
            time.sleep(0.1)
        assert_served(impatient)
        told = 0
        for number, connection in enumerate(connections):
            said = received(connection)
            if number % 2 or not said:
                assert said == b""
            else:
                assert said.startswith(b"HTTP/1.1 408") and b"did not arrive within 1 s" in said
                told += 1
        assert told
    assert_served(impatient)


def test_a_second_request_s_head_is_waited_for_no_longer_than_the_first(impatient: Gateway) -> None:
    with connected(impatient) as [connection]:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        said = b""
        while not said.endswith(b"}"):
            said += connection.recv(65536)
        assert said.startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /livez HT")
        began = time.monotonic()
        assert received(connection) == b"" and time.monotonic() - began < 8


def test_headers_without_end_are_refused(impatient: Gateway) -> None:
    with connected(impatient) as [connection]:
        connection.sendall(HEAD)
        said = b""
        try:
            for number in range(10_000):
                connection.sendall(b"X-%d: %s\r\n" % (number, b"y" * 1000))
            said = received(connection)
        except ConnectionError:
            pass  # closed while we were sending: what it said may be lost
        assert said.startswith(b"HTTP/1.1 400") or not said
    assert_served(impatient)


def test_a_large_body_in_one_piece_with_its_head_is_no_large_head(impatient: Gateway) -> None:
    data = encoded(picture(2, 1500, 1200), quality=95)
    assert len(data) > 200_000
    head = HEAD.replace(b"100000", str(len(data)).encode()) + b"Connection: close\r\n\r\n"
    with connected(impatient) as [connection]:
        connection.sendall(head + data)
        assert received(connection).startswith(b"HTTP/1.1 200")


def test_more_uploads_than_there_is_memory_for_are_refused_and_given_back(
    serve: Serve, backend: FakeBackend
) -> None:
    data = encoded(picture(3))
    with serve(backend, max_held_bytes=len(data) + 1000) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as other:
            other.sendall(HEAD + b"\r\n" + b"x" * 5000)
            until = time.monotonic() + 10
            while (refused := httpx.post(f"{url}/classify", content=data, headers=JPEG)).status_code != 503:
                assert time.monotonic() < until
            assert "bytes of uploads are held" in refused.json()["detail"]
            assert int(refused.headers["retry-after"]) >= 1
        until = time.monotonic() + 10
        while httpx.post(f"{url}/classify", content=data, headers=JPEG).status_code != 200:
            assert time.monotonic() < until
