"""Locust's shape that adds users until more of them bring no more answers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from locust import LoadTestShape, events
from locust.env import Environment
from ramp import Ramp, Step

STAGE = "stage"
"""The type of Locust's entries that hold the answers' own times."""
STAGES_MS: dict[str, list[float]] = {}
"""The same as they came: Locust rounds its own to two digits."""
SETTLE_S = 1.0
"""What a step finds is counted from this long after its users were asked for."""


def note_stages(environment: Environment, timing_ms: dict[str, float]) -> None:
    """The answer's own times as entries of their own. Not through the event `request`, which would add
    them to the aggregated requests, and so to the report's requests a second."""
    for stage, ms in timing_ms.items():
        environment.stats.get(stage, STAGE).log(ms, 0)  # type: ignore[arg-type]  # it takes fractions
        STAGES_MS.setdefault(stage, []).append(ms)


class Saturation(LoadTestShape):
    """`--steps` of `--step-s` seconds; what each found is printed at the end, and goes to `--ramp-json`."""

    def __init__(self) -> None:
        super().__init__()
        self.ramp: Ramp | None = None
        self.began = 0.0
        self.latencies_ms: list[float] = []
        self.failed = 0
        events.request.add_listener(self._note)
        events.quitting.add_listener(self._report)

    def _note(self, response_time: float, exception: Exception | None, **_: Any) -> None:
        if time.monotonic() < self.began + SETTLE_S:
            return
        if exception is None:
            self.latencies_ms.append(response_time)
        else:
            self.failed += 1

    def tick(self) -> tuple[int, float] | None:
        """Users, and how many may come a second; None ends the test."""
        assert self.runner is not None  # Locust sets it before the first tick
        given: Any = self.runner.environment.parsed_options
        now = time.monotonic()
        if self.ramp is None:
            self.ramp, self.began = Ramp([int(each) for each in given.steps.split(",")]), now
        users = self.ramp.next_users()
        if users is not None and now >= self.began + given.step_s:
            counted_s = now - self.began - SETTLE_S
            self.ramp.done.append(Step(users, counted_s, tuple(self.latencies_ms), self.failed))
            self.began, self.latencies_ms, self.failed = now, [], 0
            users = self.ramp.next_users()
        return None if users is None else (users, float(max(users, 10)))

    def _report(self, environment: Environment, **_: Any) -> None:
        given: Any = environment.parsed_options
        if self.ramp is None or not given.ramp_json:
            return
        steps = [
            {"users": s.users, "seconds": s.seconds, "latencies_ms": s.latencies_ms, "failed": s.failed}
            for s in self.ramp.done
        ]
        told = {"steps": steps, "stages_ms": STAGES_MS}
        Path(given.ramp_json).write_text(json.dumps(told) + "\n")
