"""The gateway in front of a local Triton, both below this process: one server to start, weigh and stop.

    python loadtest/gateway_and_triton.py --repository REPOSITORY --model MODEL --port PORT
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
from pathlib import Path

from servers import ROOT, free_port


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--model", default="alexnet")
    parser.add_argument("--port", type=int, required=True, help="the gateway's")
    parser.add_argument("--grpc-port", type=int, default=0, help="Triton's [default: any free one]")
    given = parser.parse_args()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    alexnet = [sys.executable, "alexnet.py"]
    grpc = str(given.grpc_port or free_port())
    ports = ["--grpc-port", grpc, "--http-port", "0", "--metrics-port", "0"]
    of = ["--repository", str(given.repository), "--models", given.model]
    front = ["serve", "--triton", f"127.0.0.1:{grpc}", "--model", given.model, "--port", str(given.port)]
    children = [
        subprocess.Popen(alexnet + rest, cwd=ROOT) for rest in (["triton", *of, *ports], front)
    ]
    while not stopped.wait(0.2) and all(child.poll() is None for child in children):
        pass
    for child in reversed(children):
        child.terminate()
    for child in children:
        child.wait(10)


if __name__ == "__main__":
    main()
