"""The gateway as a process: uvicorn around the app, said to be ready once it is, ended without a loss.

    SIGTERM ─ /readyz 503 ─ drain_delay_s ─ no new connection ─ what is under way, bounded ─ exit 0
              each answer closes its connection                 request_timeout_s and a second
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import uvicorn

from serving.backends import Backend
from serving.certificate import Certificate
from serving.decoders import Decoders
from serving.errors import MalformedRequest
from serving.head import HeadBounded
from serving.models import Others
from serving.settings import Settings
from serving.trail import wanted

if TYPE_CHECKING:
    from serving.drain import Drain
    from serving.tracing import Tracing
    from serving.workers import Place

TICK_S: Final = 0.1  # uvicorn's
_CERTIFICATE_TICKS: Final = 20
_OPS_END_S: Final = 1
logger = logging.getLogger("alexnet.gateway")


class _OpsServer(uvicorn.Server):
    """The second port: begun, kept up and ended by the first one's server, which handles the signals."""

    async def begin(self, sockets: list[socket.socket] | None) -> None:
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        await self.startup(sockets)


class _Gateway(uvicorn.Server):
    """Calls `ready(url)` when requests are accepted, and ends as the picture above shows."""

    def __init__(
        self,
        config: uvicorn.Config,
        ready: Callable[[str], None],
        drain: Drain,
        drain_delay_s: float,
        ops: _OpsServer | None,
        certificate: Certificate | None,
        place: Place | None,
    ) -> None:
        super().__init__(config)
        self._ready, self._drain, self._drain_delay_s = ready, drain, drain_delay_s
        self._ops, self._certificate, self._place = ops, certificate, place

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._ops:
            await self._ops.begin(self._place.ops_sockets if self._place else None)
        await super().startup(sockets)
        if self.started:
            if self._ops and not (self._place and self._place.slot):
                logger.info("metrics, health and docs on %s", _url(self._ops))
            self._ready(_url(self))

    async def on_tick(self, counter: int) -> bool:
        if self._ops:
            await self._ops.on_tick(counter)
        if self._certificate and self.config.ssl and counter % _CERTIFICATE_TICKS == 0:
            self._certificate.follow(self.config.ssl)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain.begun = True
        await self._serve_on()
        await super().shutdown(sockets)
        if self._ops:  # last: whoever watches sees the end
            await self._ops.shutdown(self._place.ops_sockets if self._place else None)

    async def _serve_on(self) -> None:
        """Until balancers have seen that /readyz answers 503; a second Ctrl-C cuts it short."""
        if self._drain_delay_s:
            logger.info("stopping: not ready, and serving on for %g s", self._drain_delay_s)
        for counter in range(math.ceil(self._drain_delay_s / TICK_S)):
            if self.force_exit:
                return
            await self.on_tick(counter)
            await asyncio.sleep(TICK_S)


def _url(server: uvicorn.Server) -> str:
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    scheme = "https" if server.config.is_ssl else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


async def serve(
    settings: Settings,
    backend: Backend,
    ready: Callable[[str], None],
    others: Others | None = None,
    place: Place | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; in its `place` if it is one of several workers.

    Raises ModelNotReady if the embedded model cannot be loaded, and MalformedRequest if the file of
    keys or the TLS certificate cannot be used.
    """
    certificate = None
    if settings.tls_cert and settings.tls_key:
        certificate = Certificate(settings.tls_cert, settings.tls_key)
    stopped = _stopped_by_sigterm()
    if place:
        _end_with_parent(place.lifeline)
    with closing(Decoders(settings.decode_workers, settings.decode_bounds)) as decoders:
        # While the model loads. One is enough for the first photograph; the others are the app's to start.
        decoders.start(1)
        # And so is the web framework imported: ready a fifth of a second sooner.
        imported = asyncio.to_thread(import_module, "serving.app")
        started, _ = await asyncio.gather(_start(backend, stopped), imported)
        if started:
            with _tracing() as tracing:
                gateway = _gateway(settings, backend, others, ready, certificate, decoders, place, tracing)
                await gateway.serve(place.sockets if place else None)


def _gateway(
    settings: Settings,
    backend: Backend,
    others: Others | None,
    ready: Callable[[str], None],
    certificate: Certificate | None,
    decoders: Decoders,
    place: Place | None,
    tracing: Tracing | None,
) -> _Gateway:
    from serving.app import create_app
    from serving.drain import Drain
    from serving.metrics import Shared
    from serving.sides import OpsSide

    drain = Drain()
    shared = Shared(place.metrics, place.slot) if place else None
    traced = None
    if tracing:
        from serving.tracing import Traced

        traced = partial(Traced, tracing=tracing)
    app = create_app(settings, backend, others, drain, decoders, shared, traced)
    ops = None
    if settings.ops_port is not None:
        side = uvicorn_config(
            OpsSide(app), settings, settings.ops_host, settings.ops_port, lifespan="off",
            timeout_graceful_shutdown=_OPS_END_S,
        )  # fmt: skip
        ops = _OpsServer(side)
    config = uvicorn_config(
        app, settings, settings.host, settings.port,
        timeout_graceful_shutdown=math.ceil(settings.request_timeout_s) + 1,
        ssl_certfile=settings.tls_cert, ssl_keyfile=settings.tls_key,
    )  # fmt: skip
    return _Gateway(config, ready, drain, settings.drain_delay_s, ops, certificate, place)


def uvicorn_config(app: Any, settings: Settings, host: str, port: int, **more: Any) -> uvicorn.Config:
    """As the gateway wants it on either port; `more` is uvicorn's own."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        log_config=None,  # its lines leave as ours do: serving.logs
        access_log=False,
        server_header=False,
        http=HeadBounded.within(settings.head_timeout_s),
        # Always said, because by itself uvicorn believes the loopback, and FORWARDED_ALLOW_IPS.
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies,
        **more,
    )


def _stopped_by_sigterm() -> asyncio.Event:
    """Set by a SIGTERM before uvicorn handles it; and it is 0 that a clean end exits with.

    uvicorn raises the signal again when it is done, for whoever handled it before: for this one.
    """
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()

    def stop(*_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: we are ending already
            loop.call_soon_threadsafe(stopped.set)

    signal.signal(signal.SIGTERM, stop)
    return stopped


@contextmanager
def _tracing() -> Iterator[Tracing | None]:
    """What makes spans, if the environment asks for them; without the extra, one line says so."""
    if not wanted():
        yield None
        return
    try:
        from serving.tracing import Tracing

        tracing = Tracing()
    except ModuleNotFoundError as error:
        logger.warning("no traces are sent: the package %s is missing, pip install '.[otel]'", error.name)
        yield None
        return
    except ValueError as error:
        raise MalformedRequest(f"the variables OTEL_...: {error}") from error
    try:
        yield tracing
    finally:
        tracing.close()


def _end_with_parent(lifeline: int) -> None:
    loop = asyncio.get_running_loop()

    def end() -> None:
        loop.remove_reader(lifeline)
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(lifeline, end)


async def _start(backend: Backend, stopped: asyncio.Event) -> bool:
    """Whether the model was loaded; not if the process was told to end meanwhile."""
    start, stop = asyncio.ensure_future(backend.start()), asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait((start, stop), return_when=asyncio.FIRST_COMPLETED)
        if not stop.done():
            await start
            return True
    finally:
        stop.cancel()
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    await backend.close()
    return False
