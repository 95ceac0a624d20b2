"""The gateway when more is asked than it can do, over HTTP: a real uvicorn, an engine that waits for us."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from support import FakeBackend, encoded, picture

from serving.backends import Inference
from serving.contract import Crops
from serving.preprocess import Pixels, prepare

Serve = Callable[..., AbstractContextManager[str]]
JPEG = {"content-type": "image/jpeg"}


class Gated(FakeBackend):
    """Inferences wait until the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    async def infer(self, crops: Pixels, deadline_s: float | None = None) -> Inference:
        while not self.gate.is_set():
            await asyncio.sleep(0.002)
        return await super().infer(crops, deadline_s)


@pytest.fixture
def engine() -> Iterator[Gated]:
    gated = Gated()
    yield gated
    gated.gate.set()


class Client:
    """Uploads in threads of their own."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=20)
        self._threads = ThreadPoolExecutor(32)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        self.http.close()

    def ask(self, seed: int = 0, timeout_ms: object = None, **params: object) -> Future[httpx.Response]:
        headers = JPEG if timeout_ms is None else JPEG | {"x-request-timeout-ms": str(timeout_ms)}
        return self._threads.submit(
            self.http.post,
            "/classify",
            content=encoded(picture(seed)),
            headers=headers,
            params=params,  # type: ignore[arg-type]
        )

    def until_waiting(self, crops: int) -> None:
        until = time.monotonic() + 10
        while f"alexnet_waiting_crops {crops}.0" not in self.http.get("/metrics").text:
            assert time.monotonic() < until
            time.sleep(0.005)


def test_a_refusal_does_not_wait_for_the_body(serve: Serve, engine: Gated) -> None:
    with serve(engine, max_waiting_crops=10) as url, Client(url) as client:
        first = client.ask()
        client.until_waiting(10)
        address = urlsplit(url)
        with socket.create_connection((address.hostname, address.port), timeout=10) as raw:
            raw.sendall(
                b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
                b"Content-Length: 1000000\r\n\r\n"
            )
            answer = raw.recv(4096).decode()
        assert answer.startswith("HTTP/1.1 503") and "\r\nretry-after: 1\r\n" in answer
        engine.gate.set()
        assert first.result().status_code == 200


def test_a_client_s_own_time_bounds_the_wait(serve: Serve, engine: Gated) -> None:
    with serve(engine, request_timeout_s=20) as url, Client(url) as client:
        started = time.monotonic()
        late = client.ask(timeout_ms=150).result()
        assert late.status_code == 504 and "0.15 s" in late.json()["detail"]
        assert time.monotonic() - started < 10
        client.until_waiting(0)
        engine.gate.set()
        assert client.ask(timeout_ms=15_000).result().status_code == 200
        assert engine.deadlines and engine.deadlines[-1] is not None


@pytest.mark.parametrize("timeout", ["0", "-5", "soon", "", "1e3", "10.5"])
def test_a_time_that_is_none_is_told(serve: Serve, engine: Gated, timeout: str) -> None:
    with serve(engine) as url, Client(url) as client:
        answer = client.ask(timeout_ms=timeout).result()
        assert answer.status_code == 400 and "x-request-timeout-ms" in answer.json()["detail"].lower()


def test_in_a_brownout_busy_times_are_answered_with_fewer_crops_and_say_so(
    serve: Serve, engine: Gated
) -> None:
    data = encoded(picture(3))
    with serve(engine, brownout=True, brownout_wait_ms=1e-6, decode_workers=1) as url, Client(url) as client:
        answers = [client.ask(3, top=10) for _ in range(2)]  # one in the engine, one decoded
        client.until_waiting(20)
        auto = client.ask(3, crops="auto", top=10)
        client.until_waiting(30)
        answers += [client.ask(3, top=10) for _ in range(5)]
        insists = client.ask(3, top=10, degrade="false")
        client.until_waiting(90)
        engine.gate.set()
        degraded = [answer.result().json() for answer in answers]
        assert insists.result().json()["crops"] == 10 and not insists.result().json()["degraded"]
        assert auto.result().json()["crops"] in (1, 2)
        few = [body for body in degraded[2:] if body["crops"] == 1]
        assert len(few) >= 4 and all(body["degraded"] for body in few)
        row = engine.probabilities(prepare(data, Crops.CENTER))[0]
        for body in few:
            said = {p["index"]: p["probability"] for p in body["predictions"]}
            np.testing.assert_allclose([said[index] for index in range(10)], row, rtol=1e-4)
        calm = client.ask(3).result().json()
        assert calm["crops"] == 10 and not calm["degraded"]


def test_without_brownout_nobody_gets_less_than_was_asked_for(serve: Serve, engine: Gated) -> None:
    with serve(engine, brownout_wait_ms=1.0) as url, Client(url) as client:
        answers = [client.ask() for _ in range(6)]
        client.until_waiting(60)
        engine.gate.set()
        for answer in answers:
            assert (answer.result().json()["crops"], answer.result().json()["degraded"]) == (10, False)
