"""A stream of a card's work, and how long work takes by events on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch

Run = Callable[[], object]
"""Puts one inference, or step, on the stream; it may be under way still when this returns."""

WARM_UP: Final = 5
"""Runs that are not counted: kernels are loaded, chosen and compiled, memory is taken."""
AT_ONCE: Final = 50
LEAST: Final = 5


class Event(Protocol):
    """As torch.cuda.Event."""

    def record(self) -> Any:
        """Note, on the current stream, when what is before it is done."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this event to `end_event`."""


@dataclass(frozen=True)
class Stream:
    """Where all engines put their work, so that events between are about that work."""

    device: torch.device
    handle: int
    event: Callable[[], Event]
    wait: Callable[[], None]
    """For all that is on it."""


@contextmanager
def cuda_stream() -> Iterator[Stream]:
    """A stream of its own, torch's current one in the block.

    Not torch's default stream: its handle is 0, which ONNX Runtime takes for none given, and would then
    work on one of its own, where our events see nothing.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.cuda.stream(stream):
        yield Stream(device, stream.cuda_stream, _event, stream.synchronize)
        stream.synchronize()


def _event() -> Event:
    event: Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


@dataclass(frozen=True)
class Times:
    """Seconds of one run."""

    median_s: float
    p10_s: float
    p90_s: float
    runs: int


def timed(
    run: Run, stream: Stream, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> Times:
    """Runs for about `seconds`, each between two events of its own; at least `LEAST` of them.

    Put on the stream up to `AT_ONCE` at a time, so that the host, where it is quick enough, waits for
    nothing; where it is not, the card's idle time between kernels is part of a run, as in production.
    """
    alone_s = 0.0
    for _ in range(WARM_UP):
        began = clock()
        run()
        stream.wait()
        alone_s = clock() - began
    at_once = int(min(AT_ONCE, max(1, seconds / 4 / max(alone_s, 1e-9))))
    taken_s: list[float] = []
    began = clock()
    while len(taken_s) < LEAST or clock() - began < seconds:
        pairs = []
        for _ in range(at_once):
            pairs.append((stream.event(), stream.event()))
            pairs[-1][0].record()
            run()
            pairs[-1][1].record()
        stream.wait()
        taken_s += [first.elapsed_time(last) / 1000 for first, last in pairs]
    p10, median, p90 = np.percentile(taken_s, [10, 50, 90])
    return Times(float(median), float(p10), float(p90), len(taken_s))
