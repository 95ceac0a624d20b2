"""How much work may wait, counted in crops: above it, 503 with the time after which to retry."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from serving.errors import Overloaded


class Admission:
    """Crops admitted and not yet answered. Used from the event loop only, so it takes no lock."""

    def __init__(self, max_waiting_crops: int, concurrency: int = 1) -> None:
        """`concurrency`: inferences that run side by side while others wait."""
        self.max_waiting_crops, self._concurrency = max_waiting_crops, concurrency
        self.waiting_crops = 0
        self._ms_per_crop = 5.0  # until the first measurement

    @contextmanager
    def admit(self, crops: int) -> Iterator[None]:
        """Hold a place for `crops` while the block runs; raises Overloaded when there is none."""
        if self.waiting_crops + crops > self.max_waiting_crops:
            raise Overloaded(
                f"{self.waiting_crops} crops wait, at most {self.max_waiting_crops} may; "
                f"retry in {self.retry_after_s()} s"
            )
        self.waiting_crops += crops
        try:
            yield
        finally:
            self.waiting_crops -= crops

    def measured(self, crops: int, seconds: float) -> None:
        """Note how long an inference of `crops` took (a moving average over about ten)."""
        self._ms_per_crop += 0.1 * (1000 * seconds / crops - self._ms_per_crop)

    def retry_after_s(self) -> int:
        """Whole seconds, at least 1, until what waits now will be answered."""
        return max(1, math.ceil(self.waiting_crops * self._ms_per_crop / self._concurrency / 1000))
