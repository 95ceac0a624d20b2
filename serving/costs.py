"""What an inference costs, in milliseconds of one of the engine's places: measured, by model and crops."""

from __future__ import annotations

from collections import deque
from statistics import median_low
from typing import Final

from serving.contract import CROP_COUNT, Crops

FIRST_GUESS_MS_PER_CROP: Final = 5.0
_KEPT: Final = 9
"""Measurements of which the median counts: a slow first inference, or a moment when the machine was busy
with something else, must not turn clients away."""


class Costs:
    """Medians of the last measurements. Numbers of crops not seen yet are guessed from those that were."""

    def __init__(self) -> None:
        self._recent: dict[tuple[str, int], deque[float]] = {}
        self._ms: dict[tuple[str, int], float] = {}

    def measured(self, model: str, crops: int, ms: float) -> None:
        """Note that an inference of so many crops took so long."""
        recent = self._recent.setdefault((model, crops), deque([self.ms(model, crops)], _KEPT))
        recent.append(ms)
        self._ms[model, crops] = median_low(recent)

    def ms(self, model: str, crops: int) -> float:
        """What an inference of so many crops will cost."""
        known = self._ms.get((model, crops))
        if known is not None:
            return known
        seen = {count: ms for (name, count), ms in self._ms.items() if name == model}
        if not seen:
            return crops * FIRST_GUESS_MS_PER_CROP
        nearest = min(seen, key=lambda count: abs(count - crops))
        return seen[nearest] * crops / nearest


LEVELS: Final = (max(CROP_COUNT.values()), 2, 1)
"""Crops at most, from full service to the last step before a request is refused."""


def crops_by_level(crops: Crops, *, may_degrade: bool) -> tuple[int, ...]:
    """How many crops a request costs at each of the `LEVELS`, at most."""
    asked = CROP_COUNT[crops]
    return tuple(min(asked, level) if may_degrade else asked for level in LEVELS)
