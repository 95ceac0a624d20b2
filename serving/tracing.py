"""OpenTelemetry: a span a request, its stages below it, and its trace continued in Triton (pure ASGI).

Only where the standard variables say whereto (OTEL_EXPORTER_OTLP_ENDPOINT); needs the extra `otel`.
A provider of our own, not the global one: no other library's spans join in unasked.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access import QUIET
from serving.metrics import spelled
from serving.trail import Trail, following

NAME: Final = "alexnet-serving"
PROTOCOL: Final = "http/protobuf"
CLOSE_S: Final = 3.0
"""What is not sent by then is lost: a collector that hangs does not keep the gateway from ending."""
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_NOTED: Final = ("model", "version", "crops", "degraded")
_w3c = TraceContextTextMapPropagator()


class Tracing:
    """Makes spans; `processor`: where they go, by default in batches to the collector of the environment.

    Spans wait in a bounded queue and are sent by a thread: where the collector is slow or gone they are
    dropped, and requests know nothing of it. Raises ValueError where the environment asks for a protocol
    that is not spoken here.
    """

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        _check_protocol()
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer(NAME)

    def begin(self, scope: Scope) -> Span:
        """The request's span, under the one that the client says it belongs to."""
        headers = Headers(scope=scope)
        carried = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        return self._tracer.start_span(_method(scope), _w3c.extract(carried, Context()), SpanKind.SERVER)

    def end(self, span: Span, scope: Scope, trail: Trail, status: int | None) -> None:
        """Tell what became of the request, and end its span with those of its stages below it."""
        if span.is_recording():
            span.update_name(_name(scope))
            span.set_attributes(_facts(scope, status))
            if status is None or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                span.set_status(Status(StatusCode.ERROR))
            epoch_ns = time.time_ns() - time.perf_counter_ns()
            below = set_span_in_context(span)
            for stage in trail.stages:
                began_ns, ended_ns = (epoch_ns + int(1e9 * at_s) for at_s in (stage.began_s, stage.ended_s))
                child = self._tracer.start_span(stage.name, below, start_time=began_ns)
                if stage.failed:
                    child.set_attribute("error.type", spelled(stage.failed))
                    child.set_status(Status(StatusCode.ERROR))
                child.end(ended_ns)
        span.end()

    def close(self) -> None:
        """Send what waits, in bounded time. Blocks."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)


class Traced:
    """Outside everything else, so that a span has its request's whole time."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app, self._tracing = app, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in QUIET:
            await self._app(scope, receive, send)
            return
        span, status = self._tracing.begin(scope), None
        scope.setdefault("state", {})["trace_id"] = f"{span.get_span_context().trace_id:032x}"
        trail = Trail(_onward(span))

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with following(trail):
                await self._app(scope, receive, seen)
        finally:
            trail.end()
            self._tracing.end(span, scope, trail, status)


def _check_protocol(environment: Mapping[str, str] = os.environ) -> None:
    """The exporter itself would send OTLP over HTTP to a port that expects gRPC, and tell nobody."""
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if said := environment.get(name):
            if said != PROTOCOL:
                raise ValueError(
                    f"{name}={said}, but spans are sent as {PROTOCOL} alone: name that, and the "
                    "collector's port for it (by itself 4318) in the endpoint"
                )
            return


def _resource() -> Resource:
    """As the environment describes this service; its name ours where that does not say."""
    said = Resource.create()
    if str(said.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        said = said.merge(Resource({SERVICE_NAME: NAME}))
    return said


def _onward(span: Span) -> tuple[tuple[str, str], ...]:
    """Nothing where it was decided not to sample: Triton traces each request that carries a context."""
    if not span.get_span_context().trace_flags.sampled:
        return ()
    carried: dict[str, str] = {}
    _w3c.inject(carried, set_span_in_context(span))
    return tuple(carried.items())


def _method(scope: Scope) -> str:
    return str(scope["method"]) if scope["method"] in _METHODS else "HTTP"


def _name(scope: Scope) -> str:
    """By the route, never by the path, of which there are as many as clients can think of."""
    route = getattr(scope.get("route"), "path", None)
    return f"{_method(scope)} {route}" if route else _method(scope)


def _facts(scope: Scope, status: int | None) -> dict[str, Any]:
    state = scope.get("state", {})
    noted = state.get("noted", {})
    facts = {
        "http.request.method": _method(scope),
        "http.route": getattr(scope.get("route"), "path", None),
        "http.response.status_code": status,
        "error.type": noted.get("reason"),
        "alexnet.request_id": state.get("request_id"),
    } | {f"alexnet.{name}": noted.get(name) for name in _NOTED}
    return {name: value for name, value in facts.items() if value is not None}
