"""Accuracy against latency: the network full and low rank, FP32 and INT8, one crop and ten.

    python loadtest/frontier.py CHECKPOINT DATA [--ranks 32,64,128,256,512] [--svg docs/frontier.svg]

CHECKPOINT at full rank (a factored one is multiplied out: then ranks above its own bring nothing).
Versions are made once, under .bench/ (some minutes a rank): factored on DATA/train, accuracy measured on
DATA/val. Times are of the engine alone, on every core, in one process, no server: one crop as a batch of
one, ten as the embedded engine computes them, from their square. Versions take turns in blocks of runs;
medians of the blocks' medians, and the least and the most of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench_forms import SQUARE, block, open_model
from figures import Spread, spread, table
from frontier_plot import plot
from machine import machine

ROOT = Path(__file__).resolve().parent.parent
RANKS = "32,64,128,256,512"
PRECISIONS = ("fp32", "int8")


@dataclass(frozen=True)
class Choice:
    """One version: percent of first labels that are right, and milliseconds an inference."""

    rank: int | None
    precision: str
    megabytes: float
    top1_one: float
    top1_ten: float
    one_ms: Spread
    ten_ms: Spread

    def __str__(self) -> str:
        return f"{'full' if self.rank is None else f'rank {self.rank}'} {self.precision}"


def name_of(rank: int | None, precision: str) -> str:
    """The model's name among those that `frontier_models.py` makes, as `alexnet export` gives it."""
    name = "full" if rank is None else f"rank{rank}"
    return name if precision == "fp32" else f"{name}_{precision}"


def newest(model: Path) -> Path | None:
    """A model's newest version."""
    return max(model.glob("[0-9]*"), key=lambda path: int(path.name), default=None)


def measured(versions: dict[Path, tuple[int | None, str]], rounds: int, runs: int) -> list[Choice]:
    """Each version's figures; all are open at once, and take turns."""
    one = {version: open_model(version / "model.onnx") for version in versions}
    ten = {version: open_model(version / SQUARE) for version in versions}
    times: dict[tuple[Path, int], list[float]] = {}
    for _ in range(rounds):
        for crops, models in ((1, one), (10, ten)):
            for version, (session, images) in models.items():
                taken = block(session, images(crops), runs)
                times.setdefault((version, crops), []).append(taken)
    choices = []
    for version, (rank, precision) in versions.items():
        told = json.loads((version / "provenance.json").read_text())
        accuracy = told["accuracy"]
        choices.append(
            Choice(
                rank, precision, told["model"]["bytes"] / 1e6,
                100 * accuracy["top1_center"], 100 * accuracy["top1_ten"],
                spread(times[version, 1]), spread(times[version, 10]),
            )
        )  # fmt: skip
    return choices


def is_beaten(choice: Choice, others: Sequence[Choice], crops: int) -> bool:
    """Another choice is as good in both accuracy and time, and better in one."""

    def of(each: Choice) -> tuple[float, float]:
        ms, top1 = (each.one_ms, each.top1_one) if crops == 1 else (each.ten_ms, each.top1_ten)
        return ms.median, -top1

    mine = of(choice)
    return any(
        all(a <= b for a, b in zip(of(each), mine, strict=True)) and of(each) != mine for each in others
    )


def rows(choices: Sequence[Choice]) -> list[list[str]]:
    """The table; ratios are of the full network in FP32, a star stands at what no other choice beats."""
    base = next(each for each in choices if each.rank is None and each.precision == "fp32")
    found = [["", "MB", "one crop ms", "min-max", "ratio", "top-1 %", "",
              "ten crops ms", "min-max", "ratio", "top-1 %", ""]]  # fmt: skip
    for each in choices:
        row = [str(each), f"{each.megabytes:.1f}"]
        for crops, ms, of, top1 in (
            (1, each.one_ms, base.one_ms, each.top1_one),
            (10, each.ten_ms, base.ten_ms, each.top1_ten),
        ):
            star = "" if is_beaten(each, choices, crops) else "*"
            row += [f"{ms.median:.1f}", f"{ms.low:.1f}-{ms.high:.1f}", f"{ms.median / of.median:.2f}",
                    f"{top1:.2f}", star]  # fmt: skip
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--ranks", default=RANKS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    ranks = [None, *(int(each) for each in given.ranks.split(","))]
    key = hashlib.sha256(given.checkpoint.read_bytes()).hexdigest()[:8]
    folder = ROOT / ".bench" / f"frontier-{key}"
    make = [sys.executable, str(ROOT / "loadtest" / "frontier_models.py"), str(given.checkpoint)]
    # A child process: torch's threads and memory are gone when the times are taken.
    subprocess.run([*make, str(given.data), str(folder), "--ranks", given.ranks], check=True)
    named = {(rank, each): newest(folder / name_of(rank, each)) for each in PRECISIONS for rank in ranks}
    versions = {version: choice for choice, version in named.items() if version}
    choices = measured(versions, given.rounds, given.runs)
    print(f"python {' '.join(sys.argv)}\n{machine()}")
    print(f"medians of {given.rounds} rounds of {given.runs} runs, the engine alone; * nothing beats it")
    print("\n".join(table(rows(choices))))
    if given.json:
        given.json.write_text(json.dumps([asdict(each) for each in choices], indent=1) + "\n")
    if given.svg:
        given.svg.write_text(plot(choices))


if __name__ == "__main__":
    main()
