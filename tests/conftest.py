"""Fixtures: the gateway over a fake engine, in a real server on a free loopback port."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
from support import FakeBackend, serving

from serving.backends import Backend
from serving.settings import Settings


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def serve() -> Callable[..., AbstractContextManager[str]]:
    """`with serve(backend, max_upload_bytes=...) as url`."""

    def start(backend: Backend, **settings: object) -> AbstractContextManager[str]:
        return serving(Settings(**settings), backend)  # type: ignore[arg-type]

    return start


@pytest.fixture
def live_server(backend: FakeBackend) -> Iterator[str]:
    """The gateway over the fake engine with its default settings."""
    with serving(Settings(), backend) as url:
        yield url
