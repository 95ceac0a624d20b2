"""Scoring through Triton beside the engine's own loop: same files, same decoders, same batches.

    python loadtest/bench_score.py model_repository/alexnet --images DATA/val [--files 240] [--rounds 3]

The peer decodes in as many processes and runs ONNX Runtime in its own process, without a server,
with a thread for each core. Rounds alternate; each first scores a few files uncounted. Medians, the
ratio, the command and the machine are printed. Loopback only; ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench import machine, photographs

from serving.backends import Backend, OnnxRuntimeBackend
from serving.contract import Crops
from serving.score import Job, Pace, score
from serving.settings import Settings
from serving.triton import LocalTriton
from serving.triton_backend import TritonBackend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="a model's folder in a repository")
    parser.add_argument("--images", type=Path, help="folder of JPEGs [default: generated 500x375]")
    parser.add_argument("--files", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-flight", default="3", help="batches under way; several with commas")
    given = parser.parse_args()
    print("python", *sys.argv, "\n" + machine())
    name, repository = given.model.name, given.model.parent
    workers = Settings().decode_threads
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, LocalTriton(repository, [name]) as server:
        files = write(photographs(given.images), given.files, Path(folder) / "files")
        few = write(photographs(given.images), 16, Path(folder) / "few")
        out = Path(folder) / "table.parquet"
        for _ in range(given.rounds):
            for in_flight in map(int, given.in_flight.split(",")):
                pace = Pace(workers, in_flight)
                for kind in ("triton", "in process"):
                    rate(few, out, engine(kind, server, repository, name), pace, 16)
                    speed = rate(files, out, engine(kind, server, repository, name), pace, given.files)
                    rates.setdefault(f"{kind}, {in_flight} in flight", []).append(speed)
    peer = max(statistics.median(v) for k, v in rates.items() if k.startswith("in process"))
    print(f"{given.files} files, ten crops, {workers} decoders; medians of {given.rounds} rounds")
    print(f"{'':<28}{'images/s':>9}{'min-max':>14}{'ratio':>7}")
    for kind, speeds in rates.items():
        middle, span = statistics.median(speeds), f"{min(speeds):.1f}-{max(speeds):.1f}"
        print(f"{kind:<28}{middle:>9.1f}{span:>14}{middle / peer:>7.2f}")


def engine(kind: str, server: LocalTriton, repository: Path, name: str) -> Backend:
    if kind == "triton":
        return TritonBackend(server.grpc, name, concurrency=Settings().triton_concurrency)
    return OnnxRuntimeBackend(repository, name, Settings().infer_threads)


def write(bodies: list[bytes], count: int, folder: Path) -> Path:
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:05}.jpg").write_bytes(bodies[index % len(bodies)])
    return folder


def rate(files: Path, out: Path, backend: Backend, pace: Pace, count: int) -> float:
    """Images a second, from the first file listed to the table."""
    shutil.rmtree(out.with_name(f"{out.name}.journal"), ignore_errors=True)
    started = time.perf_counter()
    summary = asyncio.run(score(Job(str(files), Crops.TEN), out, backend, pace, force=True))
    assert summary.rows == count and not summary.reasons
    return count / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
