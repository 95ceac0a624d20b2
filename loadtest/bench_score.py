"""Scoring through Triton beside the engine's own loop, in one run.

    python loadtest/bench_score.py model_repository/alexnet --images DATA/val [--files 240] [--rounds 3]

The peer has no server, no journal and no table: threads decode ahead, and ONNX Runtime answers one
photograph after the other with a thread for each core. Models are loaded and a few files scored before
the clock starts. Rounds alternate; medians, the ratio, the command and the machine are printed.
Loopback only; ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from machine import machine
from photographs import photographs

from serving.backends import open_session, run_session
from serving.contract import Crops
from serving.postprocess import average
from serving.preprocess import prepare
from serving.repository import latest_version
from serving.score import Job, Pace, Told, score
from serving.settings import Settings
from serving.triton import LocalTriton
from serving.triton_backend import TritonBackend

LOOP = "the engine's own loop"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="a model's folder in a repository")
    parser.add_argument("--images", type=Path, help="folder of JPEGs [default: generated 500x375]")
    parser.add_argument("--files", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-flight", default="2", help="batches under way; several with commas")
    given = parser.parse_args()
    print("python", *sys.argv, "\n" + machine())
    name, repository = given.model.name, given.model.parent
    workers = Settings().decode_workers
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, LocalTriton(repository, [name]) as server:
        files = write(photographs(given.images), given.files, Path(folder) / "files")
        few = write(photographs(given.images), 16, Path(folder) / "few")
        out = Path(folder) / "table.parquet"
        for _ in range(given.rounds):
            rates.setdefault(LOOP, []).append(loop_rate(files, repository, name, workers))
            for in_flight in map(int, given.in_flight.split(",")):
                score_rate(few, out, server, name, Pace(workers, in_flight))
                speed = score_rate(files, out, server, name, Pace(workers, in_flight))
                rates.setdefault(f"score, {in_flight} batches in flight", []).append(speed)
    peer = statistics.median(rates[LOOP])
    print(f"{given.files} files, ten crops, {workers} decoders; medians of {given.rounds} rounds")
    print(f"{'':<28}{'images/s':>9}{'min-max':>14}{'ratio':>7}")
    for kind, speeds in rates.items():
        middle, span = statistics.median(speeds), f"{min(speeds):.1f}-{max(speeds):.1f}"
        print(f"{kind:<28}{middle:>9.1f}{span:>14}{middle / peer:>7.2f}")


def write(bodies: list[bytes], count: int, folder: Path) -> Path:
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:05}.jpg").write_bytes(bodies[index % len(bodies)])
    return folder


def score_rate(files: Path, out: Path, server: LocalTriton, name: str, pace: Pace) -> float:
    """Images a second, from the files listed to the table written."""
    shutil.rmtree(out.with_name(f"{out.name}.journal"), ignore_errors=True)
    backend = TritonBackend(server.grpc, name, concurrency=Settings().triton_concurrency)
    started: list[float] = []
    told = Told(progress=lambda _done, _total: started.append(time.perf_counter()))
    summary = asyncio.run(score(Job(str(files)), out, backend, pace, force=True, told=told))
    assert not summary.reasons
    return summary.rows / (time.perf_counter() - started[0])


def loop_rate(files: Path, repository: Path, name: str, workers: int) -> float:
    """Images a second of decoding and inference alone."""
    session = open_session(latest_version(repository, name), Settings().infer_threads)
    paths = sorted(files.iterdir())
    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for crops in pool.map(lambda path: prepare(path.read_bytes(), Crops.TEN), paths):
            average(run_session(session, crops))
    return len(paths) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
