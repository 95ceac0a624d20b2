"""Gateways as processes of their own, started with the command and stopped by signals."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from support import ALEXNET, QUIET, ROOT


class Gateway:
    """A running `alexnet serve`; what it logs is gathered as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None and process.stderr is not None
        self.process = process
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        line = process.stdout.readline()
        found = re.search(r"https?://\S+", line)
        if not found:
            process.kill()
            self._reader.join(10)
        assert found, line + "".join(self.log)
        self.url = found[0]

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def ops_url(self) -> str:
        """It is logged before the line that `url` comes from is written, but read by another thread."""
        for _ in range(1000):
            if found := re.search(r"docs on (http://\S+)", "".join(self.log)):
                return found[1]
            self._reader.join(0.01)
        raise AssertionError("".join(self.log))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def end(self, timeout_s: float = 20) -> int:
        """Its exit status."""
        status = self.process.wait(timeout_s)
        self._reader.join(10)
        return status


@contextmanager
def gateway(
    repository: Path, *, under: Sequence[str] = (), **environment: object
) -> Iterator[Gateway]:
    """`gateway(repository, drain_delay_s=1)`: settings as variables; killed at the end if it still runs.

    `under`: the command that runs it.
    """
    variables = {f"ALEXNET_{name.upper()}": str(value) for name, value in environment.items()}
    process = subprocess.Popen(
        [*under, *ALEXNET, "serve", "--port", "0", "--repository", str(repository)],
        cwd=ROOT,
        env=QUIET | {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Gateway(process)
    finally:
        process.kill()
        process.communicate()
