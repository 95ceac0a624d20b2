"""Images a second and latency of the gateway beside the naive way, in one run.

    python loadtest/bench.py CHECKPOINT [--images FOLDER] [--clients 1,8] [--rounds 5] [--seconds 6]

Both servers hold the same full-width weights, get the same photographs and answer ten crops.
Rounds alternate, so a change in the machine's speed hits both; medians over rounds are printed,
with the command, the machine and the versions. Loopback only; ends by itself.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
BOUNDARY = "photograph"
HEADERS = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


@dataclass(frozen=True)
class Round:
    """One server under one load."""

    server: str
    clients: int
    images_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    pid: int


def photographs(folder: Path | None) -> list[bytes]:
    """JPEG files of the folder, or 24 generated pictures of 500x375."""
    if folder is not None:
        return [path.read_bytes() for path in sorted(folder.rglob("*.[jJ][pP]*[gG]"))[:200]]
    rng = np.random.default_rng(0)
    files = []
    for _ in range(24):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + rng.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


@contextmanager
def server(command: list[str], port: int, **environment: str) -> Iterator[Server]:
    """Start a server, wait until /readyz answers 200, stop it by its process id."""
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 60
        while True:
            assert process.poll() is None, f"{command} ended with {process.returncode}"
            assert time.monotonic() < until, f"{command} is not ready after 60 s"
            try:
                if httpx.get(f"{url}/readyz", timeout=1).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.05)
        yield Server(url, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def load(name: str, url: str, bodies: list[bytes], clients: int, seconds: float) -> Round:
    """Closed loop: each client sends its next photograph when it has its answer.

    Bodies are encoded beforehand and sent by http.client, so that the load generator takes as little
    as possible of the cores that the servers share with it.
    """
    latencies: list[float] = []
    until = time.perf_counter() + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        index = number
        while time.perf_counter() < until:
            started = time.perf_counter()
            connection.request("POST", "/classify", bodies[index % len(bodies)], HEADERS)
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == 200, body
            latencies.append(1000 * (time.perf_counter() - started))
            index += clients
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99])
    return Round(name, clients, len(latencies) / elapsed, float(p50), float(p95), float(p99))


def multipart(photograph: bytes) -> bytes:
    """The request's body with the photograph in the field `file`."""
    head = 'Content-Disposition: form-data; name="file"; filename="photo.jpg"\r\nContent-Type: image/jpeg'
    return f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + photograph + f"\r\n--{BOUNDARY}--\r\n".encode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def prepare(checkpoint: Path, work: Path) -> tuple[Path, Path]:
    """Both models at full width: our repository and the stock ONNX file. Runs in a child process,
    so that torch's memory is gone before anything is measured."""
    code = (
        "import sys; from pathlib import Path; from model.checkpoint import load;"
        "from model.fold import expand; from export.publish import publish;"
        "from loadtest.stock import export_stock;"
        "source, work = map(Path, sys.argv[1:]); c = load(source); c.net = expand(c.net);"
        "publish(c, source, work / 'repository', 'alexnet'); export_stock(c.net, work / 'stock.onnx')"
    )
    subprocess.run([sys.executable, "-c", code, str(checkpoint), str(work)], cwd=ROOT, check=True)
    return work / "repository", work / "stock.onnx"


COLUMNS = "{:<10}{:>8}{:>10}{:>14}{:>9}{:>8}{:>8}{:>7}"


def report(rounds: list[Round]) -> list[str]:
    """One line for each server and load, with the ratio to the naive server under the same load."""
    lines = [COLUMNS.format("server", "clients", "images/s", "min-max", "p50 ms", "p95", "p99", "ratio")]
    for clients in sorted({r.clients for r in rounds}):
        peer = median([r for r in rounds if (r.server, r.clients) == ("naive", clients)], "images_per_s")
        for name in dict.fromkeys(r.server for r in rounds):
            own = [r for r in rounds if (r.server, r.clients) == (name, clients)]
            speed = median(own, "images_per_s")
            span = f"{min(r.images_per_s for r in own):.1f}-{max(r.images_per_s for r in own):.1f}"
            latencies = (f"{median(own, percentile):.1f}" for percentile in ("p50_ms", "p95_ms", "p99_ms"))
            lines.append(
                COLUMNS.format(name, clients, f"{speed:.1f}", span, *latencies, f"{speed / peer:.2f}")
            )
    return lines


def median(rounds: list[Round], figure: str) -> float:
    """The median of one figure over rounds."""
    return float(statistics.median(getattr(r, figure) for r in rounds))


def machine() -> str:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    tools = ", ".join(
        f"{tool} {version(tool)}" for tool in ("onnxruntime", "numpy", "pillow", "fastapi", "uvicorn")
    )
    return f"{len(os.sched_getaffinity(0))} cores of {cpu}, Python {platform.python_version()}, {tools}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=Path, help="folder of JPEGs [default: generated 500x375]")
    parser.add_argument("--clients", default="1,8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--json", type=Path, help="also write every round to this file")
    given = parser.parse_args()
    files = photographs(given.images)
    bodies = [multipart(file) for file in files]
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as folder:
        repository, stock = prepare(given.checkpoint.resolve(), Path(folder))
        ours, naive = free_port(), free_port()
        run = sys.executable
        our_command = [run, "alexnet.py", "serve", "--port", str(ours), "--repository", str(repository)]
        naive_command = [run, "-m", "uvicorn", "--app-dir", "loadtest", "naive_server:app"]
        naive_command += ["--port", str(naive), "--log-level", "warning"]
        with (
            server(our_command, ours) as gateway,
            server(naive_command, naive, NAIVE_MODEL=str(stock)) as peer,
        ):
            servers = {"gateway": gateway.url, "naive": peer.url}
            for number in range(-1, given.rounds):  # round -1 warms up
                for clients in map(int, given.clients.split(",")):
                    for name, url in servers.items():
                        result = load(name, url, bodies, clients, given.seconds)
                        if number >= 0:
                            rounds.append(result)
    print("python " + " ".join(sys.argv))
    print(machine())
    print(f"{len(files)} photographs, ten crops, full width")
    print(f"medians of {given.rounds} rounds of {given.seconds:g} s")
    print("\n".join(report(rounds)))
    if given.json:
        given.json.write_text(json.dumps([asdict(r) for r in rounds], indent=1) + "\n")


if __name__ == "__main__":
    main()
