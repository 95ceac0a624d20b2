"""alexnet serve, triton and verify: servers, started and asked."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from commands.options import REPOSITORY, Repository
from commands.terminal import err, log_to_stderr, out, say
from commands.wiring import api_key, backend_of, others_of, settings_of, triton_backend
from serving.errors import MalformedRequest, ModelNotReady

if TYPE_CHECKING:
    from serving.settings import Settings
    from serving.workers import Place


def serve(
    host: Annotated[str | None, typer.Option(help="address to listen on [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="[default: 8000; 0: any free one]")] = None,
    repository: Annotated[Path | None, typer.Option(help="[default: model_repository]")] = None,
    model: Annotated[str | None, typer.Option(help="[default: alexnet]")] = None,
    threads: Annotated[int | None, typer.Option(help="inference threads [default: one a core]")] = None,
    workers: Annotated[int | None, typer.Option(help="processes that share the port [default: 1]")] = None,
    brownout: Annotated[
        bool | None, typer.Option("--brownout", help="fewer crops when busy, before requests are refused")
    ] = None,
    triton: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT[,HOST:PORT...]",
            help="Triton's gRPC answers, labels and all, in place of ONNX Runtime in this process",
        ),
    ] = None,
    api_keys: Annotated[Path | None, typer.Option(help="who may ask: a file of alexnet key new")] = None,
    ops_port: Annotated[int | None, typer.Option(help="/metrics and /docs there, not on --port")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file of the certificate and its chain")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key")] = None,
) -> None:
    """Serve POST /classify and the page. Every further knob is an ALEXNET_... variable."""
    from serving.logs import configure

    given = dict(host=host, port=port, model_repository=repository, model=model, infer_threads=threads)
    given["workers"] = workers
    doors = dict(api_keys_file=api_keys, ops_port=ops_port, tls_cert=tls_cert, tls_key=tls_key)
    settings = settings_of({**given, **doors, "triton": triton, "brownout": brownout})
    configure(settings.log_format, settings.log_level)
    if settings.workers > 1:
        _serve_in_workers(settings)
    else:
        _serve_here(settings, lambda state: say(f"alexnet-serving: {state}"))


def _serve_here(settings: Settings, tell: Callable[[str], None], place: Place | None = None) -> None:
    """`tell` is called with which model answers where, once it does."""
    from serving.server import serve as run

    backend = backend_of(settings)

    def ready(url: str) -> None:
        try:
            info = backend.model.info
            tell(f"{info.name} version {info.version} ({info.precision}) ready on {url}")
        except ModelNotReady as error:
            tell(f"on {url}, not ready: {error}")

    asyncio.run(run(settings, backend, ready, others_of(settings), place))


def _serve_in_workers(settings: Settings) -> None:
    # Nothing heavy is imported here: what has threads of its own must not be forked.
    from serving.workers import Workers, listening

    sockets = listening(settings.host, settings.port)
    ops = None if settings.ops_port is None else listening(settings.ops_host, settings.ops_port)
    Workers(
        settings.workers,
        lambda place: _serve_here(settings, place.ready, place),
        lambda states: say(f"alexnet-serving: {states[0]} ({len(states)} workers)"),
        sockets=sockets,
        ops_sockets=ops,
        end_s=settings.drain_delay_s + settings.request_timeout_s + 10,
    ).run()


def triton(
    repository: Repository = REPOSITORY,
    models: Annotated[str, typer.Option(help="names with commas [default: all it can load]")] = "",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="8000 is the gateway's; 0: any free one")] = 8003,
    grpc_port: Annotated[int, typer.Option(help="0: any free one")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="0: any free one")] = 8002,
    watch_s: Annotated[float, typer.Option(min=0.1, help="look for a new version so often")] = 2.0,
    log: Annotated[Path | None, typer.Option(help="file for everything the server says")] = None,
) -> None:
    """A local Triton server on the model repository, without Docker; follows what is published."""
    from serving.triton import LocalTriton

    log_to_stderr()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    server = LocalTriton(
        repository,
        [name.strip() for name in models.split(",") if name.strip()],
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        host=host,
        log=log,
        say=lambda text: err.print(text, highlight=False, soft_wrap=True),
    )
    with server:
        loaded = (entry for entry in server.index() if "version" in entry)  # others just lie there
        served = ", ".join(f"{entry['name']} version {entry['version']}" for entry in loaded)
        out.print(
            f"Triton: {served} ready on grpc://{server.grpc} and http://{server.http}, "
            f"metrics on http://{server.metrics}/metrics",
            highlight=False,
            soft_wrap=True,
        )
        server.follow(watch_s, stopped)


def verify(
    url: Annotated[str, typer.Argument(help="http://HOST:PORT of a gateway, or grpc://HOST:PORT/MODEL")],
    repository: Repository = REPOSITORY,
) -> None:
    """Ask a running server whether it still answers as its version was exported.

    A gateway that wants a key is shown ALEXNET_API_KEY.
    """
    from serving.verify import verify_backend, verify_gateway

    scheme, _, place = url.partition("://")
    if scheme in ("http", "https"):
        verdict = verify_gateway(url, repository, api_key())
    elif scheme == "grpc":
        servers, _, name = place.partition("/")
        backend = triton_backend(settings_of({"triton": servers, "model": name or None}))()
        verdict = asyncio.run(verify_backend(backend, repository))
    else:
        raise MalformedRequest(f"{url}: a server is http://HOST:PORT (a gateway) or grpc://HOST:PORT/MODEL")
    table = Table("golden image", "crops", "max |dp|", box=None)
    for each in verdict.differences:
        table.add_row(each.image, str(each.crops), f"{each.max_abs_difference:.1e}")
    out.print(table)
    said = f"{verdict.model} version {verdict.version}"
    if verdict.broken:
        raise ModelNotReady(f"{url}: {said} does not answer as when it was exported ({verdict.broken})")
    out.print(f"{said} answers as when it was exported (tolerance {verdict.tolerance:g})", highlight=False)
