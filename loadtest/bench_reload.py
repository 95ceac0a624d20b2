"""Does a gateway that loads version after version, under load, lose a request or keep memory?

    python loadtest/bench_reload.py model_repository/alexnet [--reloads 50] [--clients 4]

Copies the newest version (as links) again and again, each published by a rename while clients send
photographs, and waits until the gateway serves it. Prints failed requests and resident memory, after
the fifth reload and at the end. Loopback only; ends by itself.
"""

from __future__ import annotations

import argparse
import http.client
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
from closed_loop import HEADERS, multipart
from machine import machine
from photographs import photographs
from servers import free_port, started

from serving.repository import version_numbers

SETTLED = 5
"""Reloads after which memory is called settled."""


def resident_mb(pid: int) -> float:
    """VmRSS of a process, in MB of 10**6 bytes (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS"))


def publish_again(source: Path, folder: Path, number: int) -> None:
    """The same version under the next number: linked beside, then renamed."""
    staging = folder / f".staging-{number}-{os.getpid()}"
    shutil.copytree(source, staging, copy_function=os.link)
    staging.rename(folder / str(number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="a model's folder in a repository")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--reloads", type=int, default=50)
    parser.add_argument("--clients", type=int, default=4)
    given = parser.parse_args()
    print("python", *sys.argv, "\n" + machine())
    bodies = [multipart(file) for file in photographs(given.images)]
    numbers = version_numbers(given.model)
    source = given.model / str(numbers[-1])
    statuses: Counter[int | str] = Counter()
    stop = threading.Event()
    port = free_port()
    with tempfile.TemporaryDirectory(dir=given.model.parent) as repository:
        folder = Path(repository) / given.model.name
        folder.mkdir()
        shutil.copy(given.model / "labels.txt", folder)
        publish_again(source, folder, 1)
        command = [sys.executable, "alexnet.py", "serve", "--port", str(port), "--model", given.model.name]
        environment = {"ALEXNET_MODEL_REPOSITORY": repository, "ALEXNET_WATCH_S": "0.1"}
        with started(command, port, bodies[0], environment) as gateway:
            clients = [
                threading.Thread(target=client, args=(port, bodies[i:] + bodies[:i], statuses, stop))
                for i in range(given.clients)
            ]
            for thread in clients:
                thread.start()
            settled, began = 0.0, time.perf_counter()
            for number in range(2, given.reloads + 2):
                publish_again(source, folder, number)
                wait_for(gateway.url, str(number))
                if number == 1 + SETTLED:
                    settled = resident_mb(gateway.pid)
            seconds = time.perf_counter() - began
            stop.set()
            for thread in clients:
                thread.join()
            last = resident_mb(gateway.pid)
    failed = sum(statuses.values()) - statuses[200]
    print(f"{given.reloads} reloads in {seconds:.0f} s under {given.clients} clients")
    print(f"requests {sum(statuses.values())}, failed {failed} {dict(statuses)}")
    ratio = last / settled
    print(f"resident MB: {settled:.0f} after {SETTLED} reloads, {last:.0f} at the end, ratio {ratio:.2f}")


def client(port: int, bodies: list[bytes], statuses: Counter[int | str], stop: threading.Event) -> None:
    """Closed loop over one connection; an answer's status, or the error that came instead, is counted."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    index = 0
    while not stop.is_set():
        index += 1
        try:
            connection.request("POST", "/classify", bodies[index % len(bodies)], HEADERS)
            answer = connection.getresponse()
            answer.read()
            statuses[answer.status] += 1
        except (OSError, http.client.HTTPException) as error:
            statuses[type(error).__name__] += 1
            connection.close()
    connection.close()


def wait_for(url: str, version: str) -> None:
    until = time.monotonic() + 60
    while httpx.get(f"{url}/model", timeout=60).json()["version"] != version:
        assert time.monotonic() < until, f"version {version} is not served after 60 s"
        time.sleep(0.05)


if __name__ == "__main__":
    main()
