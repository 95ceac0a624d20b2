"""A token bucket: so many photographs a second, and some at once after a rest."""

from __future__ import annotations

import time
from collections.abc import Callable


class TokenBucket:
    """Full at first. Used from one event loop only, so it takes no lock."""

    def __init__(self, rate: float, size: float, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._size, self._clock_s = rate, size, clock_s
        self._level, self._at_s = size, clock_s()

    def take(self) -> float:
        """0 if there was one to take; otherwise the seconds until there will be."""
        self._fill()
        if self._level < 1:
            return (1 - self._level) / self._rate
        self._level -= 1
        return 0.0

    def resize(self, rate: float, size: float) -> None:
        """Other limits from now on; what was used before stays used."""
        if (rate, size) == (self._rate, self._size):
            return
        self._fill()
        self._rate, self._size, self._level = rate, size, min(self._level, size)

    def _fill(self) -> None:
        now_s = self._clock_s()
        self._level = min(self._size, self._level + (now_s - self._at_s) * self._rate)
        self._at_s = now_s
