"""Prometheus metrics of one gateway, in a registry of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from serving.admission import Admission
from serving.backends import ModelInfo

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Latency by stage, answers by model version and crops, refusals by status, crops waiting."""

    def __init__(self, admission: Admission) -> None:
        self.registry = CollectorRegistry()
        self._stage = Histogram(
            "alexnet_stage_seconds",
            "time in each stage of an answered request",
            ["stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._answers = Counter(
            "alexnet_answers_total",
            "answered requests",
            ["model", "version", "crops"],
            registry=self.registry,
        )
        self._refusals = Counter(
            "alexnet_refusals_total",
            "requests answered with a problem",
            ["status"],
            registry=self.registry,
        )
        waiting = Gauge("alexnet_waiting_crops", "crops admitted, not yet answered", registry=self.registry)
        waiting.set_function(lambda: admission.waiting_crops)

    def answered(self, model: ModelInfo, crops: int, timing_ms: Mapping[str, float]) -> None:
        """Note one answer and its milliseconds by stage."""
        self._answers.labels(model.name, model.version, str(crops)).inc()
        for stage, ms in timing_ms.items():
            self._stage.labels(stage).observe(ms / 1000)

    def refused(self, status: int) -> None:
        """Note one problem answer."""
        self._refusals.labels(str(status)).inc()
