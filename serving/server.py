"""The gateway as a process: uvicorn around the app, said to be ready once it is."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import uvicorn

from serving.backends import Backend
from serving.models import Others
from serving.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI


class _AnnouncingServer(uvicorn.Server):
    """Calls `ready(url)` when requests are accepted."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")


async def serve(
    settings: Settings, backend: Backend, ready: Callable[[str], None], others: Others | None = None
) -> None:
    """Serve until SIGTERM or Ctrl-C; raises ModelNotReady if the embedded model cannot be loaded."""
    # uvicorn handles SIGTERM, then raises it again for whoever handled it before: a clean end is 0.
    signal.signal(signal.SIGTERM, lambda *_: None)
    # The web framework is imported while the model loads: ready a fifth of a second sooner.
    _, create_app = await asyncio.gather(backend.start(), asyncio.to_thread(_app_factory))
    config = uvicorn.Config(
        create_app(settings, backend, others),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.request_timeout_s) + 1,
    )
    await _AnnouncingServer(config, ready).serve()


def _app_factory() -> Callable[[Settings, Backend, Others | None], FastAPI]:
    from serving.app import create_app

    return create_app
