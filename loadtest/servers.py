"""Servers under test: started in a group of their own, awaited, weighed, and stopped to the last process."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from closed_loop import HEADERS

ROOT = Path(__file__).resolve().parent.parent
START_S = 90.0
STOP_S = 3.0


@dataclass(frozen=True)
class Server:
    """A server that has answered a photograph, `ready_s` seconds after its start."""

    url: str
    pid: int
    ready_s: float


@dataclass(frozen=True)
class Memory:
    """MB of a server's processes. `pss` counts pages that they share once, `rss` once for each."""

    pss: float
    rss: float
    processes: int


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def started(
    command: Sequence[str],
    port: int,
    body: bytes,
    environment: Mapping[str, str],
    path: str = "/classify",
) -> Iterator[Server]:
    """Start it, ask it a photograph until it answers, stop it and whatever it has started.

    Raises RuntimeError with the end of its log where it ends or does not answer.
    """
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it leaves behind can be found
        )
        try:
            while not _answers(port, path, body):
                if process.poll() is not None or time.perf_counter() > began + START_S:
                    said.seek(0)
                    tail = said.read()[-2000:].decode(errors="replace")
                    raise RuntimeError(f"{' '.join(command)} does not answer on {port}; it said:\n{tail}")
                time.sleep(0.02)
            yield Server(f"http://127.0.0.1:{port}", process.pid, time.perf_counter() - began)
        finally:
            stop(process)


def _answers(port: int, path: str, body: bytes) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
    try:
        connection.request("POST", path, body, HEADERS)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def tree(pid: int) -> list[psutil.Process]:
    """The process, its descendants, and those of its session whose parents are gone."""
    found: dict[int, psutil.Process] = {}
    with suppress(psutil.NoSuchProcess):
        leader = psutil.Process(pid)
        found = {each.pid: each for each in (leader, *leader.children(recursive=True))}
    for each in psutil.process_iter():
        with suppress(OSError):
            if each.pid not in found and os.getsid(each.pid) == pid:
                found[each.pid] = each
    return list(found.values())


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end; after STOP_S end it, and its children in any case."""
    family = tree(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.kill()  # psutil checks the start time: a number used again is not ended
    process.wait(10)
    psutil.wait_procs(family, 10)


def memory(pid: int) -> Memory:
    """Of the process and everything below it, now."""
    pss = rss = 0.0
    count = 0
    for each in tree(pid):
        with suppress(psutil.Error):
            info = each.memory_full_info()
            rss += info.rss / 1e6
            pss += getattr(info, "pss", info.rss) / 1e6
            count += 1
    return Memory(pss, rss, count)
