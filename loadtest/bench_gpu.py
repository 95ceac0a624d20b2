"""An NVIDIA card's inferences and training steps, beside its own products and copies, in one run.

    python loadtest/bench_gpu.py [--batches 1,10,64,256] [--seconds 1] [--json FILE] [--markdown FILE]

torch in eager mode, ONNX Runtime's CUDA provider and, where TensorRT is, the product's engine; then steps of
`alexnet train`, the paper's recipe. The 2012 network at full width, 1000 classes, random weights; an
inference's pictures lie on the card; CUDA events, medians. What cannot run here is a row with its
reason. Without a card nothing is measured, and the command fails.

    matrix %, bandwidth %   of what a large product, a large copy reach on this card in this run
    floor %                 the work's least time at those rates, layer after layer, of the time it took
    max |dp|                of a probability, from PyTorch in FP32 on the CPU; above 0.02 the row is a fault
    upload                  a training batch from the host's memory to the card: a part of every step
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

import torch
from figures import table
from gpu_card import AbsentError, card, card_rates, need_cuda
from gpu_events import Stream, cuda_stream
from gpu_report import Row, as_json, page, rates_cells, text
from gpu_rows import ENGINES, Job, engine_rows, opened, random_net, training_rows
from gpu_training import BATCH
from machine import machine

from export.gate import generated_crops
from model.net import Architecture

BATCHES: Final = "1,10,64,256"
LIMIT_S: Final = 480.0
TOOLS: Final = ("torch", "triton", "onnxruntime", "onnxruntime-gpu", "tensorrt", "numpy")


def facts() -> dict[str, str]:
    """What ran where, and when."""
    return {
        "command": f"python {' '.join(sys.argv)}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(TOOLS),
        **card(),
    }


def rows(job: Job, batches: Sequence[int], training_batch: int) -> Iterator[Row]:
    """All of them, one after the other."""
    for engine, precision in ENGINES:
        empty = [Row(engine, precision, batch) for batch in batches]
        yield from engine_rows(job, empty, partial(opened, job, engine, precision))
    yield from training_rows(job, training_batch)


def measured(given: argparse.Namespace, stream: Stream, folder: Path) -> bool:
    """Measure, print, write; whether nothing was a fault."""
    until = time.monotonic() + given.limit
    told = facts()
    print("\n".join(f"{name}: {value}" for name, value in told.items()), flush=True)
    rates, absent = card_rates(
        stream, given.seconds, torch.cuda.get_device_capability(), torch.cuda.is_bf16_supported(False)
    )
    own = rates_cells(rates, absent)
    print("\n" + "\n".join(table(own)), flush=True)
    net, crops = random_net(Architecture()), generated_crops(max(given.batches))
    job = Job(net, crops, stream, rates, absent, folder, given.seconds, until)
    found = []
    for row in rows(job, given.batches, BATCH):
        found.append(row)
        state = row.reason or f"{row.images_s:.0f} images/s"
        print(f"{row.engine} {row.precision} {row.batch}: {state}", file=sys.stderr, flush=True)
    print("\n" + "\n".join(text(found)))
    if given.json:
        given.json.write_text(json.dumps(as_json(told, rates, absent, found), indent=1) + "\n")
    if given.markdown:
        given.markdown.write_text(page(told, own, found))
    return not any(row.failed for row in found)


def _numbers(text: str) -> list[int]:
    batches = [int(part) for part in text.split(",")]
    if min(batches) < 1:
        raise argparse.ArgumentTypeError(f"batches of at least 1, not {text}")
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batches", type=_numbers, default=BATCHES)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a row, after its warm-up (default: 1)")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S,
        help="seconds after which no row is begun (default: 480);\na build under way may take longer",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, unrounded")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables, for a document")
    given = parser.parse_args()
    try:
        need_cuda()
    except AbsentError as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory() as folder, cuda_stream() as stream:
        if not measured(given, stream, Path(folder)):
            sys.exit("error: some rows failed; the table tells which, and why")


if __name__ == "__main__":
    main()
