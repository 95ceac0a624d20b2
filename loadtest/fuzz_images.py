"""A fuzz of the image path: damaged files of every accepted format, through the gateway's own decoders.

    python loadtest/fuzz_images.py --seconds 600 --seed 1 --keep found
    python loadtest/fuzz_images.py --seed 1 --only 1234 --keep found      one of them again

Each is decoded in a process with the gateway's limits. A square, or a refusal that is documented, is an
answer; a crash, a hang, more memory than allowed or an error that nobody foresaw is a finding: its file is
kept, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from machine import cores, machine
from mutations import Case, case, good_files
from PIL import features as pillow

from serving.decoder import Bounds, Failure, Upload
from serving.decoders import Decoders
from serving.preprocess import Pixels

DOCUMENTED = {"empty", "undecodable", "not_an_image", "too_many_pixels"}
SLOW_S = 2.0
"""Longer for a file of at most some hundred kilobytes is a finding, too."""
SHOWN = 5

Decode = Callable[[bytes], Pixels | Failure]


@dataclass(frozen=True)
class Cost:
    """Of one case; `peak_mb`: resident in its worker at most, which has about 35 MB when idle."""

    number: int
    format: str
    size: int
    seconds: float
    peak_mb: float
    answer: str

    def __str__(self) -> str:
        return (
            f"{self.number:>9} {self.format:5}{self.size:>9,} bytes {1000 * self.seconds:7.0f} ms"
            f" {self.peak_mb:6.0f} MB  {self.answer}"
        )


@dataclass
class Report:
    """What a fuzz has seen; `found` is empty where all is well."""

    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest: list[Cost] = field(default_factory=list)
    largest: list[Cost] = field(default_factory=list)
    found: list[Cost] = field(default_factory=list)

    def add(self, cost: Cost) -> None:
        self.kinds[cost.format, cost.answer.partition(":")[0]] += 1
        self.slowest = sorted([*self.slowest, cost], key=lambda c: -c.seconds)[:SHOWN]
        self.largest = sorted([*self.largest, cost], key=lambda c: -c.peak_mb)[:SHOWN]
        if cost.answer.partition(":")[0] not in DOCUMENTED | {"answered"} or cost.seconds > SLOW_S:
            self.found.append(cost)

    def lines(self) -> Iterator[str]:
        """For people."""
        for (image_format, kind), count in sorted(self.kinds.items()):
            yield f"{image_format:5} {kind:16} {count:>9,}"
        for title, costs in (("slowest", self.slowest), ("largest", self.largest), ("FOUND", self.found)):
            yield title
            yield from map(str, costs)


def answer_of(square: Pixels | Failure) -> str:
    """One of `DOCUMENTED`, "answered", or a finding with what was said."""
    if not isinstance(square, Failure):
        return "answered"
    return square.reason if square.reason in DOCUMENTED else f"{square.reason}: {square.detail}"


class Measured:
    """One worker of the gateway's pool; forgets the memory that it took before."""

    def __init__(self, bounds: Bounds) -> None:
        self._decoders = Decoders(1, bounds)

    def cost(self, one: Case) -> Cost:
        """Decode it."""
        pids = self._decoders.pids
        for pid in pids:
            with suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")
        began = time.perf_counter()
        answer = answer_of(self._decoders.decode(Upload(one.data)))
        seconds = time.perf_counter() - began
        peak_mb = max((_peak_mb(pid) for pid in pids), default=0.0)  # 0 for one that has died
        return Cost(one.number, one.format, len(one.data), seconds, peak_mb, answer)

    def close(self) -> None:
        """End the worker."""
        self._decoders.close()


def _peak_mb(pid: int) -> float:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1000
    return 0.0


def fuzz(seed: int, numbers: Iterator[int], measured: Measured, report: Report, lock: threading.Lock,
         until_s: float, keep: Path | None) -> None:  # fmt: skip
    """Until the time is over or the numbers are; several may run at once."""
    while time.monotonic() < until_s:
        with lock:
            number = next(numbers, None)
        if number is None:
            return
        one = case(seed, number)
        cost = measured.cost(one)
        with lock:
            before = len(report.found)
            report.add(cost)
            if len(report.found) > before:
                print("found", cost, flush=True)
                if keep is not None:
                    kept(one, keep)


def features() -> Iterator[str]:
    """The libraries that decode, with their versions."""
    for name in ("libjpeg_turbo", "zlib", "webp", "libtiff", "avif"):
        yield f"{name} {pillow.version(name)}"


def kept(one: Case, folder: Path) -> None:
    """The case as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{one.number}.{one.format.lower()}").write_bytes(one.data)


def main(arguments: list[str] | None = None) -> int:
    """Fuzz as the flags say; 1 where anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the first case's number")
    parser.add_argument("--count", type=int, help="so many cases at most")
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument("--keep", type=Path, help="folder for the files that were found, or for --only")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds for one file, as in the gateway")
    given = parser.parse_args(arguments)
    if given.only is not None:
        given.start, given.count = given.only, 1
        if given.keep:
            kept(case(given.seed, given.only), given.keep)
    numbers = itertools.islice(itertools.count(given.start), given.count)
    report, lock, bounds = Report(), threading.Lock(), Bounds(given.timeout, 20_000_000)
    print("python", *sys.argv, "\n" + machine(("pillow", "numpy")))
    print(f"{len(good_files())} good files, {', '.join(features())}", flush=True)
    began = time.monotonic()

    def run(_: int) -> None:
        with closing(Measured(bounds)) as measured:
            fuzz(given.seed, numbers, measured, report, lock, began + given.seconds, given.keep)

    with ThreadPoolExecutor(cores()) as threads:
        list(threads.map(run, range(cores())))
    took, count = time.monotonic() - began, sum(report.kinds.values())
    print(*report.lines(), sep="\n")
    print(f"seed {given.seed}: {count:,} files in {took:.0f} s, {len(report.found)} found")
    return 1 if report.found else 0


if __name__ == "__main__":
    sys.exit(main())
