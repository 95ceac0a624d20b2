"""Milliseconds of one inference for each form of a network beside the stock export, in one run.

    python loadtest/bench_forms.py CHECKPOINT VERSION... [--crops 10,1] [--rounds 9] [--runs 10]

CHECKPOINT gives the peer's weights (full width: `torch.onnx.export` as it comes, LRN as AveragePool
and Pow); each VERSION is a folder of the model repository. The engine alone: ONNX Runtime, every
core, no server. Ten crops are also asked for as the embedded engine does, by their square. Models take
turns in blocks of runs; medians of the blocks' medians are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from machine import machine

ROOT = Path(__file__).resolve().parent.parent

SQUARE = "square.onnx"
WARM_UP = 3
COLUMNS = "{:<44}{:>8}{:>8}{:>10}{:>16}{:>8}"


def stock(checkpoint: Path, path: Path) -> None:
    """Export in a child process, so that torch's threads and memory are gone when it is measured."""
    code = (
        "import sys; from pathlib import Path; from model.checkpoint import load;"
        "from model.fold import expand; from loadtest.stock import export_stock;"
        "export_stock(expand(load(Path(sys.argv[1])).net), Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, str(checkpoint), str(path)], cwd=ROOT, check=True)


def open_model(path: Path) -> tuple[onnxruntime.InferenceSession, Any]:
    """A session, and a function of the crops' count that makes its random input."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted, rng = session.get_inputs()[0], np.random.default_rng(0)

    def images(count: int) -> dict[str, Any]:
        if path.name == SQUARE:
            return {wanted.name: rng.integers(0, 256, (1, 256, 256, 3), np.uint8)}
        if wanted.type == "tensor(uint8)":
            return {wanted.name: rng.integers(0, 256, (count, 224, 224, 3), np.uint8)}
        return {wanted.name: rng.normal(size=(count, 3, 224, 224)).astype(np.float32)}

    return session, images


def block(session: onnxruntime.InferenceSession, feed: dict[str, Any], runs: int) -> float:
    """Median milliseconds of `runs` inferences, after a few that are not counted."""
    times = []
    for run in range(WARM_UP + runs):
        started = time.perf_counter()
        session.run(None, feed)
        if run >= WARM_UP:
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def name_of(version: Path) -> str:
    """The version's folder, its precision, and its rank where fc6 and fc7 are factors."""
    provenance = json.loads((version / "provenance.json").read_text())
    rank = provenance["architecture"]["low_rank"]
    return f"{version} {provenance['precision']}" + (f" rank {rank}" if rank else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("versions", type=Path, nargs="+")
    parser.add_argument("--crops", default="10,1")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--runs", type=int, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        peer = Path(folder) / "stock.onnx"
        stock(given.checkpoint.resolve(), peer)
        paths = {"stock": peer} | {name_of(v): v / "model.onnx" for v in given.versions}
        squares = {f"{name_of(v)} square": v / SQUARE for v in given.versions if (v / SQUARE).is_file()}
        paths |= squares
        models = {name: open_model(path) for name, path in paths.items()}
        sizes = {name: path.stat().st_size / 1e6 for name, path in paths.items()}
    print("python " + " ".join(sys.argv))
    print(machine())
    print(f"medians of {given.rounds} rounds of {given.runs} runs, milliseconds")
    print(COLUMNS.format("model", "MB", "crops", "ms", "min-max", "ratio"))
    for crops in map(int, given.crops.split(",")):
        asked = {name: model for name, model in models.items() if crops == 10 or name not in squares}
        blocks: dict[str, list[float]] = {name: [] for name in asked}
        for _ in range(given.rounds):
            for name, (session, images) in asked.items():
                blocks[name].append(block(session, images(crops), given.runs))
        base = statistics.median(blocks["stock"])
        for name, times in blocks.items():
            middle, span = statistics.median(times), f"{min(times):.1f}-{max(times):.1f}"
            row = (name, f"{sizes[name]:.1f}", crops, f"{middle:.1f}", span, f"{middle / base:.2f}")
            print(COLUMNS.format(*row))


if __name__ == "__main__":
    main()
