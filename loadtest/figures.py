"""Percentiles, medians and their spread: what every load test's report is made of."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds; `count` says how much p99 may be trusted."""

    p50: float
    p95: float
    p99: float
    count: int


@dataclass(frozen=True)
class Spread:
    """The median of several rounds, and the least and the most."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f}-{self.high:.1f})"


def percentiles(values: Sequence[float]) -> Percentiles:
    """Of at least one value, by linear interpolation between the two nearest."""
    if not values:
        raise ValueError("percentiles of nothing")
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return Percentiles(float(p50), float(p95), float(p99), len(values))


def spread(values: Iterable[float]) -> Spread:
    """Of at least one value."""
    taken = list(values)
    return Spread(statistics.median(taken), min(taken), max(taken))


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of columns as wide as their widest cell; the first `left` to the left, figures to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
