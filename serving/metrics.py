"""Prometheus metrics of one gateway, in a registry of its own; or of several workers, summed."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector

from serving.admission import Admission
from serving.backends import ModelInfo

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BYTES: Final = (10e3, 30e3, 100e3, 300e3, 1e6, 3e6, 10e6, 30e6)
_MODEL: Final = ("model", "version", "crops")
_WORD: Final = re.compile(r"(?<=[a-z])(?=[A-Z])")


_FRESH_S: Final = 0.5


class Shared(NamedTuple):
    """Where this worker counts, and as which of the workers."""

    folder: Path
    slot: int


def spelled(reason: str) -> str:
    """`TooManyBytes` -> `too_many_bytes`: a reason as metrics and log lines tell it."""
    return _WORD.sub("_", reason).lower()


class Metrics:
    """What an operator asks of a gateway: how fast, how much, what is refused and why, what waits.

    Every label comes from a closed set: stages, versions that were loaded, numbers of crops, the error tree.
    """

    def __init__(
        self, admission: Admission, shared: Shared | None = None, inferences: Callable[[], int] = int
    ) -> None:
        """`inferences`: how many were begun so far."""
        self._shared = shared
        if shared:
            # By slot and not by process: who replaces a dead worker goes on counting where that one stopped.
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(shared.folder)
            values.ValueClass = values.MultiProcessValue(lambda: shared.slot)  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._stage = Histogram(
            "alexnet_stage_seconds",
            "time in each stage of an answered request",
            ["stage", *_MODEL],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._upload = Histogram(
            "alexnet_upload_bytes", "size of answered photographs", buckets=BYTES, registry=self.registry
        )
        self._answers = self._counter("alexnet_answers", "answered requests", *_MODEL)
        self._degraded = self._counter("alexnet_degraded_answers", "answers from fewer crops than asked for")
        self._refusals = self._counter(
            "alexnet_refusals", "requests answered with a problem", "status", "reason"
        )
        self._changes = self._counter("alexnet_version_changes", "times another version answered", "model")
        self._inferences = self._counter("alexnet_inferences", "begun, also for clients that left meanwhile")
        self._begun, self._begun_told = inferences, 0
        self._version: dict[str, str] = {}
        self.in_flight = self._gauge(
            "alexnet_requests_in_flight", "uploads being read, waiting or answered", "livesum"
        )
        waiting = self._gauge("alexnet_waiting_crops", "crops admitted, not yet answered", "livesum")
        wait = self._gauge(
            "alexnet_wait_seconds", "estimated, until what is admitted now will be answered", "livemax"
        )
        level = self._gauge("alexnet_brownout_level", "0: all crops, 1: two, 2: one", "livemax")
        self._looked: dict[Gauge, Callable[[], float]] = {
            waiting: lambda: admission.waiting_crops,
            wait: lambda: admission.wait_ms() / 1000,
            level: lambda: admission.level,
        }

    def text(self) -> bytes:
        """As Prometheus reads it: of all workers where there are several, whichever is asked."""
        self._look()
        if not self._shared:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together, str(self._shared.folder))  # type: ignore[no-untyped-call]
        return generate_latest(together)

    async def keep_fresh(self) -> None:
        """Another worker may be asked, and it sees only what was written down."""
        while self._shared:
            self._look()
            await asyncio.sleep(_FRESH_S)

    def answered(
        self, model: ModelInfo, crops: int, timing_ms: Mapping[str, float], size: int, *, degraded: bool
    ) -> None:
        """Note one answer: milliseconds by stage, the photograph's bytes, whether crops were left out."""
        labels = (model.name, model.version, str(crops))
        self._answers.labels(*labels).inc()
        for stage, ms in timing_ms.items():
            self._stage.labels(stage, *labels).observe(ms / 1000)
        self._upload.observe(size)
        if degraded:
            self._degraded.inc()
        if self._version.setdefault(model.name, model.version) != model.version:
            self._version[model.name] = model.version
            self._changes.labels(model.name).inc()

    def refused(self, status: int, reason: str) -> None:
        """Note one problem answer; `reason` is the error's class, told as `too_many_bytes`."""
        self._refusals.labels(str(status), spelled(reason)).inc()

    def _look(self) -> None:
        for gauge, now in self._looked.items():
            gauge.set(now())
        begun = self._begun()
        self._inferences.inc(begun - self._begun_told)
        self._begun_told = begun

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(name, says, labels, registry=self.registry)

    def _gauge(self, name: str, says: str, mode: Literal["livesum", "livemax"]) -> Gauge:
        """`mode`: what several workers' values make; a dead one's count no more."""
        return Gauge(name, says, registry=self.registry, multiprocess_mode=mode)
