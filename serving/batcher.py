"""Inferences in the engine's places; small ones that wait are joined into one.

A crop alone costs twice what it costs among ten (full width, two cores: 13.6 against 7.2 ms; INT8 5.7
against 2.1), since its time goes into reading the weights. Nothing waits for company: what has come while
every place was busy goes together.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from serving.backends import Backend, Inference
from serving.preprocess import Pixels, count_views, is_square
from serving.trail import Trail, current, following


@dataclass(frozen=True)
class Share:
    """One request's part of an inference: its rows, and what it cost."""

    inference: Inference
    waited_s: float
    ran_s: float
    """The whole inference; `cost_s` is this request's share of it, by crops."""
    cost_s: float


@dataclass(eq=False)
class _Item:
    backend: Backend
    images: Pixels
    deadline_s: float | None
    trail: Trail | None = field(default_factory=current)
    since: float = field(default_factory=time.perf_counter)
    done: asyncio.Future[Share] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Used from one event loop only, so it takes no lock."""

    def __init__(self, places: int, max_crops: int) -> None:
        """`places`: inferences side by side. `max_crops`: up to which waiting requests are joined."""
        self._free, self._max_crops = places, max_crops
        self._waiting: deque[_Item] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self.inferences = 0
        """Begun so far."""

    async def infer(self, backend: Backend, images: Pixels, deadline_s: float | None = None) -> Share:
        """Crops, or a square, as the backend takes them -> float32 [N, classes] of one version; raises as it.

        Cancelled, it leaves the queue; an inference is given up when nobody waits for any of its rows.
        """
        item = _Item(backend, images, deadline_s)
        self._waiting.append(item)
        self._start()
        try:
            return await item.done
        finally:
            if item in self._waiting:
                self._waiting.remove(item)

    def _start(self) -> None:
        while self._free and self._waiting:
            items = self._joined()
            self._free -= 1
            task = asyncio.create_task(self._run(items))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            for item in items:
                item.done.add_done_callback(partial(_cancel_unwanted, items, task))

    def _joined(self) -> list[_Item]:
        """The first that waits, and crops for the same model that fit in beside it; a square has no room."""
        first = self._waiting.popleft()
        items = [first]
        room = 0 if is_square(first.images) else self._max_crops - len(first.images)
        for item in list(self._waiting):
            if item.backend is first.backend and not is_square(item.images) and len(item.images) <= room:
                self._waiting.remove(item)
                items.append(item)
                room -= len(item.images)
        return items

    async def _run(self, items: list[_Item]) -> None:
        started = time.perf_counter()
        try:
            images = np.concatenate([item.images for item in items]) if len(items) > 1 else items[0].images
            self.inferences += 1
            # Not of the request whose task started this; one inference can continue one trace only.
            with following(next((item.trail for item in items if item.trail), None)):
                inference = await items[0].backend.infer(images, _latest(items))
            _tell(items, inference, started)
        except Exception as error:  # noqa: BLE001  each of those who wait is told
            for item in items:
                if item.trail:
                    item.trail.failed(item.since, started, error)
                if not item.done.done():
                    item.done.set_exception(error)
        finally:
            self._free += 1
            self._start()


def _latest(items: list[_Item]) -> float | None:
    deadlines = [item.deadline_s for item in items if item.deadline_s is not None]
    return max(deadlines) if len(deadlines) == len(items) else None


def _tell(items: list[_Item], inference: Inference, started: float) -> None:
    ran_s = time.perf_counter() - started
    row, count = 0, len(inference.probabilities)
    for item in items:
        rows = inference.probabilities[row : row + count_views(item.images)]
        row += len(rows)
        if not item.done.done():
            mine = Inference(rows, inference.model)
            item.done.set_result(Share(mine, started - item.since, ran_s, ran_s * len(rows) / count))


def _cancel_unwanted(items: list[_Item], task: asyncio.Task[None], _: object) -> None:
    if all(item.done.cancelled() for item in items):
        task.cancel()
