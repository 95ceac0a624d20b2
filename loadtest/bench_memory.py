"""Seconds from start to ready, resident memory under load, and what a request costs above the engine.

    python loadtest/bench_memory.py model_repository/alexnet [--requests 1000] [--clients 32] [--starts 3]

The gateway is started so many times; the last one answers the requests, of so many clients, then a tenth
of them of eight and of one. The ceiling is the engine alone, in the same places, on photographs that are
decoded already. The gateway's queue is made long enough for every client, so that none is refused.
Loopback only; ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from closed_loop import HEADERS, multipart
from machine import machine
from photographs import photographs
from servers import ROOT, memory

from serving.backends import OnnxRuntimeBackend
from serving.contract import CHANNELS, RESIZE_SIZE
from serving.settings import Settings

LONG_QUEUE = {"ALEXNET_MAX_WAITING_CROPS": "100000", "ALEXNET_MAX_WAIT_S": "60"}


@contextmanager
def gateway(model: Path) -> Iterator[tuple[subprocess.Popen[str], str, float]]:
    """A gateway that is ready: its process, its address, and the seconds that it took."""
    command = [sys.executable, "alexnet.py", "serve", "--port", "0", "--model", model.name]
    started = time.perf_counter()
    command += ["--repository", str(model.parent)]
    environment = os.environ | LONG_QUEUE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = re.search(r"http://([\w.:]+)", process.stdout.readline())
            assert said is not None, "the gateway did not start"
            assert httpx.get(f"{said[0]}/readyz").status_code == 200
            yield process, said[1], time.perf_counter() - started
        finally:
            process.terminate()


def peak_mb(pid: int) -> float:
    """The most that was resident of a process, in MB of 10**6 bytes (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def ask(address: str, bodies: list[bytes], clients: int, requests: int) -> tuple[float, list[dict[str, Any]]]:
    """Closed loop: images a second, and `timing_ms` of each answer with the client's own as `client`."""

    def client(number: int) -> list[dict[str, Any]]:
        connection = http.client.HTTPConnection(address, timeout=60)
        timings = []
        for index in range(number, requests, clients):
            started = time.perf_counter()
            connection.request("POST", "/classify", bodies[index % len(bodies)], HEADERS)
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == 200, body
            timings.append(json.loads(body)["timing_ms"] | {"client": 1000 * (time.perf_counter() - started)})
        connection.close()
        return timings

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        timings = [timing for part in pool.map(client, range(clients)) for timing in part]
    return len(timings) / (time.perf_counter() - started), timings


async def ceiling(model: Path, clients: int, requests: int) -> float:
    """Images a second of the engine's own loop, ten crops each, decoded already."""
    engine = OnnxRuntimeBackend(model.parent, model.name, Settings().infer_threads)
    await engine.start()
    shape = (1, RESIZE_SIZE, RESIZE_SIZE, CHANNELS)  # what the gateway gives it for ten crops
    square = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    places = min(clients, engine.concurrency)

    async def place() -> None:
        for _ in range(requests // places):
            await engine.infer(square)

    started = time.perf_counter()
    await asyncio.gather(*(place() for _ in range(places)))
    rate = requests // places * places / (time.perf_counter() - started)
    await engine.close()
    return rate


def line(clients: int, rate: float, top: float, timings: list[dict[str, Any]]) -> str:
    p50, p99 = np.percentile([timing["client"] for timing in timings], [50, 99])
    stages = ", ".join(f"{name} {statistics.median(t[name] for t in timings):.2f}" for name in timings[0])
    told = f"{clients} clients: {rate:.1f} images/s of {top:.1f} ({rate / top:.2f})"
    return f"{told}, p50 {p50:.1f}, p99 {p99:.1f} ms\n    median ms by stage: {stages}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="a model's folder in a repository")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--starts", type=int, default=3)
    given = parser.parse_args()
    given.model = given.model.resolve()
    print("python", *sys.argv, "\n" + machine())
    bodies = [multipart(file) for file in photographs(given.images)]
    ready = []
    for _ in range(given.starts - 1):
        with gateway(given.model) as (_, _, seconds):
            ready.append(seconds)
    fewer = max(given.requests // 10, 8)
    with gateway(given.model) as (process, address, seconds):
        ready.append(seconds)
        began = memory(process.pid)
        served = {given.clients: ask(address, bodies, given.clients, given.requests)}
        after, peak = memory(process.pid), peak_mb(process.pid)
        served |= {clients: ask(address, bodies, clients, fewer) for clients in (8, 1)}
    print("seconds from start to ready:", *(f"{seconds:.2f}" for seconds in ready))
    print(
        f"resident MB of {after.processes} processes, shared pages once: {began.pss:.0f} ready, "
        f"{after.pss:.0f} after {given.requests} requests; the first process alone at most {peak:.0f}"
    )
    for clients, (rate, timings) in served.items():
        print(line(clients, rate, asyncio.run(ceiling(given.model, clients, fewer)), timings))


if __name__ == "__main__":
    main()
