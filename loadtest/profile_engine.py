"""Where an inference's time goes, by ONNX Runtime's own profiler, beside the processor's best product.

    python loadtest/profile_engine.py model_repository/alexnet/1/square.onnx... [--runs 20]

Each file alone, every core, ten crops of one photograph (model.onnx: a batch of ten). Operators are summed
by the network's layers, others by their kind. `GFLOP/s` counts a product and a sum as two; beside it stands
what NumPy's 2048 x 2048 FP32 product reaches in the same run. The profiler itself takes some time, so the
total is above an inference's own.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from bench_forms import SQUARE
from figures import table
from machine import machine

WARM_UP = 3
SIDE = 2048
MODEL = "model.onnx"
SHOWN = 14
GROUPS = (1, 2)
"""Of the network's convolutions; the 2012 network has two groups in some."""

Channels = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """A convolution or a product, and the weights that each element of its output meets."""

    name: str
    weights: int


@dataclass
class Part:
    """One layer, or one kind of operator that is none, in all runs."""

    ms: float = 0.0
    calls: int = 0
    flop: float = 0.0


def layers(model: Path) -> dict[Channels, Layer]:
    """By channels in and out, from model.onnx's weights. Only outer factors have them alike, and one name."""
    found: dict[Channels, Layer] = {}
    for weights in onnx.load(str(model), load_external_data=False).graph.initializer:
        shape, name = list(weights.dims), weights.name.split(".weight")[0].split(".band")[0]
        if len(shape) == 4:
            layer = Layer(name, math.prod(shape[1:]))
            found |= {(groups * shape[1], shape[0]): layer for groups in GROUPS}
        elif len(shape) == 2:  # of a product, or LRN's 1 x 1 convolution
            alike = found.get((shape[1], shape[0]))
            found[shape[1], shape[0]] = Layer(f"{alike.name} {name}" if alike else name, shape[1])
    return found


def layer_of(event: dict[str, Any], known: dict[Channels, Layer]) -> Layer | None:
    """The operator's layer, by its shapes: weights that were packed are no longer among its inputs."""
    told = event["args"]
    if not told["op_name"].endswith(("Conv", "Gemm", "MatMul")):
        return None
    [taken], [given] = told["input_type_shape"][0].values(), told["output_type_shape"][0].values()
    both = ((taken[axis], given[axis]) for axis in (-1, 1))  # NHWC in INT8, NCHW in FP32
    return next((known[channels] for channels in both if channels in known), None)


def parts(events: Iterable[dict[str, Any]], known: dict[Channels, Layer]) -> dict[str, Part]:
    """Sums of the profiler's operator events, the slowest first; of an `If` the operators within it."""
    found: dict[str, Part] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        name = event["args"]["op_name"]
        if name == "If":
            continue
        layer = layer_of(event, known)
        part = found.setdefault(layer.name if layer else name, Part())
        part.ms += event["dur"] / 1000
        part.calls += 1
        if layer:
            [given] = event["args"]["output_type_shape"][0].values()
            part.flop += 2 * layer.weights * math.prod(given)
    return dict(sorted(found.items(), key=lambda each: -each[1].ms))


def profiled(path: Path, runs: int) -> tuple[float, list[dict[str, Any]]]:
    """Median milliseconds of an inference without the profiler, and the events of `runs` with it."""
    shape = (1, 256, 256, 3) if path.name == SQUARE else (10, 224, 224, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    plain = _session(path, onnxruntime.SessionOptions())
    times = []
    for _ in range(WARM_UP + runs):
        began = time.perf_counter()
        plain.run(None, {plain.get_inputs()[0].name: images})
        times.append(1000 * (time.perf_counter() - began))
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        session = _session(path, options)
        for _ in range(runs):
            session.run(None, {session.get_inputs()[0].name: images})
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    return float(np.median(times[WARM_UP:])), events


def _session(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def product_gflops(runs: int = 9) -> float:
    """The best of several FP32 products of NumPy's, all cores."""
    a, b = np.random.default_rng(0).normal(size=(2, SIDE, SIDE)).astype(np.float32)
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * SIDE**3 / min(times) / 1e9


def rows(found: dict[str, Part], runs: int) -> list[list[str]]:
    """The table, an inference's part of each; the smallest are one row."""
    total = sum(part.ms for part in found.values())
    shown, rest = list(found.items())[:SHOWN], list(found.values())[SHOWN:]
    if rest:
        shown.append(("others", Part(sum(k.ms for k in rest), sum(k.calls for k in rest))))
    body = [
        [name, f"{part.calls / runs:g}", f"{part.ms / runs:.2f}", f"{100 * part.ms / total:.1f}",
         f"{part.flop / part.ms / 1e6:.0f}" if part.flop else ""]
        for name, part in shown
    ]  # fmt: skip
    work = sum(part.flop for part in found.values())
    whole = ["all", "", f"{total / runs:.2f}", "100.0", f"{work / total / 1e6:.0f}"]
    return [["layer or operator", "calls", "ms", "%", "GFLOP/s"], *body, whole]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=20)
    given = parser.parse_args()
    print(f"python {' '.join(sys.argv)}\n{machine()}")
    print(f"NumPy's FP32 product: {product_gflops():.0f} GFLOP/s")
    for path in given.files:
        ms, events = profiled(path, given.runs)
        print(f"\n{path}: {ms:.1f} ms an inference, median of {given.runs}")
        print("\n".join(table(rows(parts(events, layers(path.with_name(MODEL))), given.runs))))


if __name__ == "__main__":
    main()
