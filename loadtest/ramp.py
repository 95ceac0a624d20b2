"""The ramp to saturation: more users step by step, until more users bring no more answers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from figures import percentiles

STEPS = (1, 2, 4, 8, 16, 32, 64)
GAIN = 1.05
"""A step that brings less than 5 % more answers than the best before it brings nothing."""
LEAST_USERS = 8
"""Fewer may be told by chance that there is no more: a few users hardly meet in the queue."""
TOO_MANY_FAILED = 0.05


@dataclass(frozen=True)
class Step:
    """What so many users got."""

    users: int
    seconds: float
    latencies_ms: tuple[float, ...]
    failed: int

    @property
    def per_s(self) -> float:
        """Answers a second."""
        return len(self.latencies_ms) / self.seconds

    @property
    def failed_share(self) -> float:
        """0..1"""
        return self.failed / max(1, self.failed + len(self.latencies_ms))


@dataclass
class Ramp:
    """Which step is next, given what the steps so far have found."""

    users: Sequence[int] = STEPS
    done: list[Step] = field(default_factory=list)

    def next_users(self) -> int | None:
        """None when the server is saturated, or the steps are over."""
        if self.saturated or len(self.done) == len(self.users):
            return None
        return self.users[len(self.done)]

    @property
    def best(self) -> Step | None:
        """The step with the fewest users that is within GAIN of the most answers."""
        most = max((step.per_s for step in self.done), default=0.0)
        return next((step for step in self.done if most and step.per_s * GAIN >= most), None)

    @property
    def saturated(self) -> bool:
        """Two steps in a row brought nothing, or one had many failures: a single one may be chance."""
        if self.done and self.done[-1].failed_share > TOO_MANY_FAILED:
            return True
        if len(self.done) < 3 or self.done[-1].users < LEAST_USERS:
            return False
        before = max(step.per_s for step in self.done[:-2])
        return all(step.per_s < GAIN * before for step in self.done[-2:])

    def rows(self) -> list[list[str]]:
        """After the headings, a row a step."""
        rows = [["users", "answers/s", "p50 ms", "p95", "p99", "answers", "failed"]]
        for step in self.done:
            times = ["", "", ""]
            if step.latencies_ms:
                found = percentiles(step.latencies_ms)
                times = [f"{ms:.0f}" for ms in (found.p50, found.p95, found.p99)]
            counts = [str(len(step.latencies_ms)), str(step.failed)]
            rows.append([str(step.users), f"{step.per_s:.1f}", *times, *counts])
        return rows

    def verdict(self) -> str:
        """One sentence."""
        if (best := self.best) is None:
            return "no answers"
        told = f"at {best.users} users: {best.per_s:.1f} answers a second"
        return f"saturated {told}; more only wait longer" if self.saturated else f"not saturated {told}"
