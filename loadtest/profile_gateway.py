"""Where the gateway's processor time goes, for each answer: the event loop, the engine, the decoders.

    python loadtest/profile_gateway.py MODEL [--images DATA/val] [--crops ten] [--clients 8] [--seconds 20]
        [--py-spy py-spy]

MODEL: a model's folder in a repository. The kernel's own account of each thread is read before and after a
closed loop; the difference is divided by the answers. Then, where py-spy is installed (`pip install
py-spy`), the process's threads are sampled under the same load, and told by where they were.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from closed_loop import Load, closed_loop, multipart
from figures import percentiles, table
from machine import cores, machine
from photographs import photographs
from servers import free_port, started, tree

LONG_QUEUE = {"ALEXNET_MAX_WAITING_CROPS": "100000", "ALEXNET_MAX_WAIT_S": "60"}
RATE = 200
SHOWN = 12
LOOP, ENGINE, DECODERS = "event loop", "engine, and threads that wait for decoders", "decoders"


def spent(pid: int) -> Counter[str]:
    """Seconds of the processor so far: of the main thread, the process's others, and its children."""
    seconds: Counter[str] = Counter()
    for process in tree(pid):
        for thread in process.threads():
            name = DECODERS if process.pid != pid else LOOP if thread.id == pid else ENGINE
            seconds[name] += thread.user_time + thread.system_time
    return seconds


def by_place(stacks: Sequence[str]) -> Counter[tuple[str, str]]:
    """Samples by the thread's kind and the innermost function's file, of py-spy's `raw` lines.

    A line is the thread, `thread (ID): NAME`, and frames from the outermost, `function (file:line)`, joined
    by semicolons, then a count.
    """
    found: Counter[tuple[str, str]] = Counter()
    for line in stacks:
        stack, _, count = line.rpartition(" ")
        thread, *frames = stack.split(";")
        if frames:
            kind = thread.rpartition(": ")[2].rstrip("_0123456789")
            file = frames[-1].rpartition("(")[2].partition(":")[0].rstrip(")")
            found[kind, "/".join(Path(file).parts[-2:])] += int(count)
    return found


def sampled(py_spy: str, pid: int, seconds: float, load: Callable[[], object]) -> Counter[tuple[str, str]]:
    """What py-spy saw of the process under `load`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stacks"
        command = [py_spy, "record", "--pid", str(pid), "--threads", "--nonblocking", "--rate", str(RATE),
                   "--duration", f"{seconds:.0f}", "--format", "raw", "--output", str(file)]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as spy:
            load()
            said = spy.communicate()[1]
        if not file.is_file():
            raise RuntimeError(f"{' '.join(command)} saw nothing; it said:\n{said}")
        return by_place(file.read_text().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--crops", default="ten", choices=["ten", "auto", "center"])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--py-spy", default="py-spy", help="its command")
    given = parser.parse_args()
    model, port = given.model.resolve(), free_port()
    bodies = [multipart(file) for file in photographs(given.images)]
    command = [sys.executable, "alexnet.py", "serve", "--port", str(port), "--model", model.name]
    command += ["--repository", str(model.parent)]
    print(f"python {' '.join(sys.argv)}\n{machine()}")
    with started(command, port, bodies[0], LONG_QUEUE) as server:

        def load(seconds: float) -> Load:
            return closed_loop(server.url, f"/classify?crops={given.crops}", bodies, given.clients, seconds)

        load(2)  # warm
        before, began = spent(server.pid), time.perf_counter()
        found = load(given.seconds)
        took = time.perf_counter() - began
        difference = spent(server.pid) - before
        print(f"{found.images_per_s:.1f} images/s, p50 {percentiles(found.latencies_ms).p50:.1f} ms\n")
        rows = [["processor", "ms an answer", "% of the cores"]]
        for name in (ENGINE, DECODERS, LOOP):
            share = difference[name] / took
            rows.append([name, f"{1000 * share / found.images_per_s:.2f}", f"{100 * share / cores():.1f}"])
        print("\n".join(table(rows)))
        if not shutil.which(given.py_spy):
            print(f"\n{given.py_spy} is not installed: nothing was sampled")
            return
        places = sampled(given.py_spy, server.pid, given.seconds, lambda: load(given.seconds))
    total = RATE * given.seconds
    rows = [["thread", "in", "% of a core"]]
    rows += [[*place, f"{100 * count / total:.1f}"] for place, count in places.most_common(SHOWN)]
    print(f"\nsampled {RATE} times a second\n" + "\n".join(table(rows, left=2)))


if __name__ == "__main__":
    main()
