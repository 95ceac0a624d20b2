"""/readyz tells of an engine that hangs, and of nothing else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import httpx
import pytest
from support import FakeBackend, encoded, picture

from serving.backends import Inference
from serving.errors import ModelNotReady
from serving.preprocess import Pixels
from serving.pulse import STALE_AFTER, Pulse

Serve = Callable[..., AbstractContextManager[str]]


class Hanging(FakeBackend):
    """Answers until it is told to hang."""

    def __init__(self) -> None:
        super().__init__()
        self.hangs = threading.Event()

    async def infer(self, crops: Pixels, deadline_s: float | None = None) -> Inference:
        while self.hangs.is_set():
            await asyncio.sleep(0.005)
        return await super().infer(crops, deadline_s)


def until(url: str, status: int) -> None:
    limit = time.monotonic() + 15
    while httpx.get(f"{url}/readyz").status_code != status:
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_an_engine_that_hangs_is_not_ready_while_the_process_lives_and_one_that_is_back_is(
    serve: Serve,
) -> None:
    backend = Hanging()
    with serve(backend, pulse_s=0.1) as url:
        until(url, 200)
        backend.hangs.set()
        until(url, 503)
        told = httpx.get(f"{url}/readyz")
        assert "has not answered for" in told.json()["detail"] and told.headers["retry-after"] == "2"
        assert httpx.get(f"{url}/livez").status_code == 200
        backend.hangs.clear()
        until(url, 200)


def test_an_idle_engine_is_asked_and_a_busy_one_is_not(serve: Serve) -> None:
    backend, photograph = Hanging(), encoded(picture(1))
    with serve(backend, pulse_s=0.4) as url, httpx.Client(base_url=url) as client:
        for _ in range(12):  # for longer than three looks
            answer = client.post("/classify", content=photograph, headers={"content-type": "image/jpeg"})
            assert answer.status_code == 200
            time.sleep(0.1)
        assert {len(batch) for batch in backend.batches} == {10}
        limit = time.monotonic() + 15
        while len(backend.batches[-1]) != 1:
            assert time.monotonic() < limit
            time.sleep(0.01)


def test_an_engine_that_fails_is_not_ready_either(serve: Serve) -> None:
    def fail() -> None:
        raise ModelNotReady("away")

    with serve(FakeBackend(before=fail), pulse_s=0.05) as url:
        until(url, 503)


def test_without_looks_it_is_always_well() -> None:
    async def run() -> None:
        pulse = Pulse(FakeBackend(), 0)
        await asyncio.wait_for(pulse.look(), 1)
        pulse.check()
        stale = Pulse(FakeBackend(), 1e-9)
        await asyncio.sleep(STALE_AFTER * 1e-9 + 0.001)
        with pytest.raises(ModelNotReady):
            stale.check()

    asyncio.run(run())
