"""What a trace will tell of one request, noted by whoever does its stages; nothing where nobody traces.

    serving.tracing ── Trail ──> the request's context ── passed("decode", ...) by each stage
                                                       └─ headers, sent on to whoever infers
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Stage:
    """Begin and end in seconds of time.perf_counter; `failed`: the kind of error that ended it."""

    name: str
    began_s: float
    ended_s: float
    failed: str | None = None


@dataclass
class Trail:
    """One request's. `headers`: what continues its trace elsewhere (W3C traceparent, tracestate)."""

    headers: Headers = ()
    stages: list[Stage] = field(default_factory=list)
    """In the order of their ends."""

    def failed(self, waited_since_s: float, began_s: float, error: Exception) -> None:
        """Note an inference that has just failed, and that it was waited for. Its error's kind alone: words
        may hold an address."""
        self.stages.append(Stage("queue", waited_since_s, began_s))
        self.stages.append(Stage("infer", began_s, time.perf_counter(), type(error).__name__))

    def end(self) -> None:
        """Tasks that the request left behind have its context, but are none of its work."""
        self.headers = ()


_current: ContextVar[Trail | None] = ContextVar("trail", default=None)


def current() -> Trail | None:
    """The trail of the request that this is done for."""
    return _current.get()


def passed(stage: str, began_s: float, ended_s: float) -> None:
    """Note a stage of the current request; seconds of time.perf_counter."""
    if trail := _current.get():
        trail.stages.append(Stage(stage, began_s, ended_s))


def onward() -> Headers | None:
    """What whoever is asked for the current request is shown; None: nothing."""
    trail = _current.get()
    return trail.headers or None if trail else None


@contextmanager
def following(trail: Trail | None) -> Iterator[None]:
    """Work in a task of its own, for a request that another task began."""
    token = _current.set(trail)
    try:
        yield
    finally:
        _current.reset(token)


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the standard variables ask for traces. Asked here, where OpenTelemetry need not be there."""
    named = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    off = off or environment.get("OTEL_TRACES_EXPORTER", "otlp") == "none"
    return not off and any(environment.get(name) for name in named)
