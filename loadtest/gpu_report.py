"""What `make bench-gpu` prints: a row for each engine, precision and batch, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from figures import table
from gpu_events import Times
from gpu_work import Achieved, Rates

HEAD = ("", "precision", "batch", "ms", "p10-p90", "images/s", "TFLOP/s", "matrix %", "bandwidth %",
        "floor %", "max |dp|")  # fmt: skip
LEFT = 2
RATES_HEAD = ("precision", "product TFLOP/s", "copy GB/s")


@dataclass(frozen=True)
class Row:
    """One measurement, or the reason that there is none.

    `achieved` is None where there is no work to compare with; `difference`: the most that a
    probability differs from PyTorch's in FP32 on the CPU.
    """

    engine: str
    precision: str
    batch: int
    times: Times | None = None
    achieved: Achieved | None = None
    difference: float | None = None
    reason: str = ""
    failed: bool = False
    """The reason is a fault, not something that this machine lacks."""

    @property
    def images_s(self) -> float | None:
        """Images a second; None without a measurement."""
        return self.batch / self.times.median_s if self.times else None


def reasons(rows: Sequence[Row]) -> list[str]:
    """Each once, in order of appearance: row i refers to it as [i + 1]."""
    return list(dict.fromkeys(row.reason for row in rows if row.reason))


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table with its head; a row that was not measured refers to its reason and has no figure."""
    numbers = {reason: f"[{number}]" for number, reason in enumerate(reasons(rows), start=1)}
    return [
        list(HEAD),
        *([row.engine, row.precision, str(row.batch), *_figures(row, numbers)] for row in rows),
    ]


def _figures(row: Row, numbers: Mapping[str, str]) -> list[str]:
    empty = len(HEAD) - 3
    if row.times is None:
        return [numbers[row.reason], *["-"] * (empty - 1)]
    times, done = row.times, row.achieved
    ms = [f"{1000 * times.median_s:.3f}", f"{1000 * times.p10_s:.3f}-{1000 * times.p90_s:.3f}"]
    rate = f"{row.batch / times.median_s:.0f}"
    parts = ["-"] * 4
    if done is not None:
        percents = (done.of_matrix, done.of_bandwidth, done.of_floor)
        parts = [f"{done.flop_s / 1e12:.1f}", *(f"{100 * part:.0f}" for part in percents)]
    return [*ms, rate, *parts, "-" if row.difference is None else f"{row.difference:.0e}"]


def rates_cells(rates: Mapping[str, Rates], absent: Mapping[str, str]) -> list[list[str]]:
    """The card's own, with their head."""
    measured = [[name, f"{r.flop_s / 1e12:.1f}", f"{r.bytes_s / 1e9:.0f}"] for name, r in rates.items()]
    return [list(RATES_HEAD), *measured, *([name, reason, "-"] for name, reason in absent.items())]


def text(rows: Sequence[Row]) -> list[str]:
    """For a terminal."""
    return [*table(cells(rows), LEFT), *_notes(rows)]


def markdown(found: Sequence[Sequence[str]], left: int = LEFT) -> list[str]:
    """A table for a document, figures to the right."""
    head, *body = found
    rule = ["---" if index < left else "---:" for index in range(len(head))]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, rule, *body)]


def page(facts: Mapping[str, str], rates: Sequence[Sequence[str]], rows: Sequence[Row]) -> str:
    """For docs/: what ran where, the card's rates, the table, the reasons."""
    told = [f"- {name}: {value}" for name, value in facts.items()]
    notes = [f"- {note}" for note in _notes(rows)]
    parts = [told, markdown(rates, left=1), markdown(cells(rows)), notes]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _notes(rows: Sequence[Row]) -> list[str]:
    return [f"[{number}] {reason}" for number, reason in enumerate(reasons(rows), start=1)]


def as_json(
    facts: Mapping[str, str], rates: Mapping[str, Rates], absent: Mapping[str, str], rows: Sequence[Row]
) -> dict[str, Any]:
    """All of it, unrounded."""
    lacking = {name: {"reason": reason} for name, reason in absent.items()}
    return {
        "facts": dict(facts),
        "rates": {name: asdict(each) for name, each in rates.items()} | lacking,
        "rows": [asdict(row) | {"images_s": row.images_s} for row in rows],
    }
