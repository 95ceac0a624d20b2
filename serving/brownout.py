"""Brownout: as the queue grows, fewer crops for each photograph instead of an answer for fewer.

The idea is Klein, Maggio, Arzen and Hernandez-Rodriguez, "Brownout: Building More Robust Cloud
Applications" (ICSE 2014): optional work is left out under load; here it is eight or nine of ten crops.
"""

from __future__ import annotations

from collections.abc import Sequence


class Brownout:
    """The level of service, with hysteresis so that it does not flicker.

    Level 0 is full service. The level is the first at which what waits is done within `target_ms`; back
    towards full service it goes only where that would be done within half of it.
    """

    def __init__(self, target_ms: float) -> None:
        self.target_ms, self.level = target_ms, 0

    def update(self, wait_ms: Sequence[float]) -> int:
        """The level for the next request; `wait_ms[level]`: until what else waits is done, at each level."""
        last = len(wait_ms) - 1
        while self.level < last and wait_ms[self.level] > self.target_ms:
            self.level += 1
        while self.level > 0 and wait_ms[self.level - 1] <= self.target_ms / 2:
            self.level -= 1
        return self.level
