"""An open loop: photographs arrive at random at a given rate, whether or not earlier ones were answered.

    python loadtest/open_loop.py http://127.0.0.1:8000 --rates 5,10,15 [--seconds 20] [--images FOLDER]

As people do, and as a closed loop does not: there a slow server is asked less, so its worst moments
are hardly seen. Here a request's latency counts from the moment it was to be sent, so that waiting
behind a stall is part of it (no coordinated omission). Arrivals are a Poisson process, the same one
for the same seed. A table for each rate is printed, --json writes it; `late ms` is how far behind its
own schedule this generator was: above a few milliseconds, believe the generator's machine, not the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httptools
import numpy as np
import numpy.typing as npt
from closed_loop import multipart
from figures import percentiles, table
from light_client import LightClient
from machine import machine
from photographs import CROPS, given_folder, photographs

TIMEOUT_S = 30.0


def arrivals(rate: float, seconds: float, seed: int = 0) -> npt.NDArray[np.float64]:
    """Seconds from the start at which requests are to be sent: a Poisson process of `rate` a second."""
    if rate <= 0 or seconds <= 0:
        raise ValueError(f"rate {rate} and seconds {seconds} must be positive")
    rng = np.random.default_rng(seed)
    enough = int(rate * seconds + 10 * np.sqrt(rate * seconds) + 20)
    times = np.cumsum(rng.exponential(1 / rate, enough))
    return times[times < seconds]


@dataclass
class Answers:
    """What came back at one rate."""

    rate: float
    seconds: float
    latencies_ms: list[float] = field(default_factory=list)
    stages_ms: dict[str, list[float]] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    late_ms: list[float] = field(default_factory=list)
    degraded: int = 0

    def note(self, status: str, latency_ms: float, body: dict[str, Any]) -> None:
        """One answer; only those that answer the photograph have a latency and stages."""
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status != "200":
            return
        self.latencies_ms.append(latency_ms)
        self.degraded += bool(body.get("degraded"))
        for stage, ms in body.get("timing_ms", {}).items():
            self.stages_ms.setdefault(stage, []).append(ms)

    def row(self) -> list[str]:
        """Of `report`'s table."""
        sent, answered = sum(self.statuses.values()), len(self.latencies_ms)
        others = ", ".join(f"{n} x {status}" for status, n in self.statuses.items() if status != "200")
        times = ["", "", "", ""]
        if answered:
            found = percentiles(self.latencies_ms)
            times = [f"{ms:.0f}" for ms in (found.p50, found.p95, found.p99, max(self.latencies_ms))]
        late = f"{percentiles(self.late_ms).p99:.1f}" if self.late_ms else ""
        figures = [f"{self.rate:g}", str(sent), f"{answered / self.seconds:.1f}", *times]
        return [*figures, str(self.degraded), late, others or "none"]


TIMES = ["p50 ms", "p95", "p99", "max"]
HEADINGS = ["arrivals/s", "sent", "answered/s", *TIMES, "degraded", "late p99", "failed"]


def answer_rows(found: Sequence[Answers]) -> list[list[str]]:
    """After the headings, a row for each rate."""
    return [HEADINGS, *(each.row() for each in found)]


def stage_rows(found: Sequence[Answers]) -> list[list[str]]:
    """After the headings, a row for each stage of the answers' own timings."""
    rows = [["stage ms, p50 / p95", *(f"at {each.rate:g}/s" for each in found)]]
    for stage in dict.fromkeys(stage for each in found for stage in each.stages_ms):
        at = (percentiles(each.stages_ms[stage]) if stage in each.stages_ms else None for each in found)
        rows.append([stage, *(f"{p.p50:.1f} / {p.p95:.1f}" if p else "" for p in at)])
    return rows


def mixed_urls(url: str) -> list[str]:
    """Of a gateway: each way to ask, in its proportion."""
    asked = [crops for crops, share in CROPS.items() for _ in range(round(20 * share))]
    return [f"{url}/classify?crops={crops}" for crops in asked]


Post = Callable[[str, bytes], Awaitable[tuple[int, bytes]]]
"""Sends a body to an address: the answer's status and body, or an exception in ERRORS."""
ERRORS = (OSError, TimeoutError, httptools.HttpParserError)


async def open_loop(
    post: Post,
    urls: Sequence[str],
    bodies: Sequence[bytes],
    rate: float,
    seconds: float,
    seed: int = 0,
) -> Answers:
    """Send to one of `urls` by chance at the given rate; ends when the last answer is there, or after
    TIMEOUT_S."""
    answers, started = Answers(rate, seconds), time.perf_counter()
    rng = np.random.default_rng(seed)

    async def one(due: float, url: str, body: bytes) -> None:
        answers.late_ms.append(1000 * (time.perf_counter() - due))
        told: dict[str, Any] = {}
        try:
            number, answer = await post(url, body)
            status, told = str(number), json.loads(answer) if number == 200 else {}
        except ERRORS as error:
            status = type(error).__name__
        answers.note(status, 1000 * (time.perf_counter() - due), told)

    async with asyncio.TaskGroup() as tasks:
        for number, after in enumerate(arrivals(rate, seconds, seed)):
            due = started + float(after)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            url = urls[int(rng.integers(len(urls)))]
            tasks.create_task(one(due, url, bodies[number % len(bodies)]))
    return answers


async def open_loops(
    urls: Sequence[str], bodies: Sequence[bytes], rates: Sequence[float], seconds: float
) -> list[Answers]:
    """One rate after the other; a few photographs first, so that connections stand and engines are warm."""
    async with LightClient(TIMEOUT_S) as client:
        await open_loop(client.post, urls, bodies, min(rates), 2, seed=1)
        return [await open_loop(client.post, urls, bodies, rate, seconds) for rate in rates]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("url", help="http://HOST:PORT of a gateway")
    parser.add_argument("--rates", default="2,5,10", help="photographs a second, with commas")
    parser.add_argument("--seconds", type=float, default=20, help="at each rate")
    parser.add_argument("--crops", default="ten", choices=["ten", "center", "auto", "mixed"])
    parser.add_argument("--images", type=Path, help="a folder of photographs [default: generated]")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    bodies = [multipart(file) for file in photographs(given_folder(given.images))]
    url, rates = given.url.rstrip("/"), [float(rate) for rate in given.rates.split(",")]
    urls = [f"{url}/classify?crops={given.crops}"] if given.crops != "mixed" else mixed_urls(url)
    found = asyncio.run(open_loops(urls, bodies, rates, given.seconds))
    print(machine(("httptools", "numpy")))
    print("\n".join([*table(answer_rows(found)), "", *table(stage_rows(found))]))
    if given.json:
        given.json.write_text(json.dumps([asdict(each) for each in found]) + "\n")


if __name__ == "__main__":
    main()
