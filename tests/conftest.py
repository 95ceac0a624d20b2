"""Fixtures: the gateway over a fake engine, and a real Triton, on free loopback ports."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
from chromium import browser, open_page  # noqa: F401 (fixtures)
from support import NARROW, FakeBackend, serving, triton_repository

from serving.backends import Backend
from serving.errors import ModelNotReady
from serving.settings import Settings
from serving.triton import LocalTriton
from serving.triton_environment import environment

# A shell that starts the tests in the background has SIGINT ignored, in their children too: then those that
# are told to stop by Ctrl-C would not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """fc6 and fc7 of 64 instead of 4096: the same code in a twentieth of the time and the disk."""
    monkeypatch.setattr("model.net.HIDDEN", NARROW)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def serve() -> Callable[..., AbstractContextManager[str]]:
    """`with serve(backend, max_upload_bytes=...) as url`; an idle engine is left in peace."""

    def start(backend: Backend, **settings: object) -> AbstractContextManager[str]:
        return serving(Settings(**{"pulse_s": 0} | settings), backend)  # type: ignore[arg-type]

    return start


@pytest.fixture
def live_server(backend: FakeBackend) -> Iterator[str]:
    """The gateway over the fake engine with its default settings."""
    with serving(Settings(pulse_s=0), backend) as url:
        yield url


@pytest.fixture(scope="session")
def triton_installed() -> None:
    """Triton's environment, made once on a machine; without it such tests skip, in CI they fail."""
    try:
        environment()
    except ModelNotReady as error:
        if os.environ.get("REQUIRE_TRITON"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def triton(triton_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    """A real tritonserver over a tiny repository, for tests that leave it as it is."""
    with LocalTriton(triton_repository(tmp_path_factory.mktemp("triton"))) as server:
        yield server
