"""A local Triton server on a model repository, without Docker: started, awaited, followed, stopped.

    with LocalTriton(repository) as triton:
        triton.grpc        # 127.0.0.1:PORT

Its models are loaded explicitly, so that a version is served when it is asked for and not while it is
being written. `follow` asks for each that is published or withdrawn.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from serving.backends import load
from serving.contract import CONFIG_FILE
from serving.errors import MalformedRequest, ModelNotReady, ServingError
from serving.repository import EXPORT_HINT, latest_version, newest_state
from serving.triton_environment import Environment, environment

HOST: Final = "127.0.0.1"
START_S: Final = 60
STOP_S: Final = 3
_SHARED_MEMORY: Final = Path("/dev/shm")
_OURS: Final = "alexnet-triton-"
"""What the names of our folders and regions begin with; the parent's process id follows."""
_DIE_WITH_PARENT: Final = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
os.execv(sys.argv[1], sys.argv[1:])
"""
_HARMLESS: Final = re.compile(r"CUDA|GPU|pinned|NVML|cudaGet", re.IGNORECASE)
"""What a server built for GPUs says on a machine without one."""

logger = logging.getLogger("alexnet.triton")


class LocalTriton:
    """tritonserver as a child process; a port 0 is any free one. Linux: it dies with its parent."""

    def __init__(
        self,
        repository: Path,
        models: Iterable[str] = (),
        *,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        host: str = HOST,
        log: Path | None = None,
        arguments: Iterable[str] = (),
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`models`: default every one that the `onnxruntime` backend serves; `log`: everything it says."""
        self.repository, self.models = repository, list(models) or servable_models(repository)
        self._host, self._ports = host, [http_port, grpc_port, metrics_port]
        self._log, self._arguments, self._say = log, list(arguments), say
        self._process: subprocess.Popen[str] | None = None
        self._said: deque[str] = deque(maxlen=40)
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def http(self) -> str:
        """HOST:PORT"""
        return f"{self._host}:{self._ports[0]}"

    @property
    def grpc(self) -> str:
        """HOST:PORT"""
        return f"{self._host}:{self._ports[1]}"

    @property
    def metrics(self) -> str:
        """HOST:PORT"""
        return f"{self._host}:{self._ports[2]}"

    @property
    def pid(self) -> int:
        """Of the server's process; raises ModelNotReady where none was started."""
        if self._process is None:
            raise ModelNotReady("Triton is not running")
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process is gone without having been stopped."""
        return self._process is not None and self._process.poll() is not None

    def start(self) -> None:
        """Start it and wait until every model is ready; raises ModelNotReady with what it said."""
        self.stop()  # what one that crashed has left
        made = environment(self._say)
        sweep()
        self._ports = _free_ports(self._host, self._ports)
        self._folder = tempfile.TemporaryDirectory(prefix=f"{_OURS}{os.getpid()}-")
        try:
            self._process = self._launch(made, Path(self._folder.name))
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it cleanly, by force after a few seconds, and remove what it left."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_S + 5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            with suppress(ProcessLookupError):  # a crashed server leaves its Python stubs behind
                os.killpg(process.pid, signal.SIGKILL)
        if self._folder is not None:
            sweep(self._regions)
            self._folder.cleanup()
            self._folder = None

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def index(self) -> list[dict[str, Any]]:
        """Every version the server knows: name, version, state and reason."""
        answer: list[dict[str, Any]] = ask(self.http, "v2/repository/index", {})
        return answer

    def follow(self, every_s: float, stopped: threading.Event) -> None:
        """Until `stopped` is set: load what is published, go back where a version was withdrawn.

        A new version is first opened and asked its golden images here; one that fails is not handed to
        the server, which keeps the old one. Raises ModelNotReady if the server ends.
        """
        seen = {model: newest_state(self.repository, model) for model in self.models}
        while not stopped.wait(every_s):
            if self.ended:
                raise ModelNotReady(self._ending())
            for model in self.models:
                now = newest_state(self.repository, model)
                if now != seen[model]:
                    seen[model] = now
                    self._reload(model)

    @property
    def _regions(self) -> str:
        """What its shared memory regions' names begin with."""
        assert self._folder is not None
        return f"{Path(self._folder.name).name}-"

    def _reload(self, model: str) -> None:
        try:
            version = latest_version(self.repository, model)
            load(version, threads=1)
            load_model(self.http, model)
        except ServingError as error:
            logger.error("%s: what was served goes on being served: %s", model, error)
        else:
            logger.info("%s: version %s is served now", model, version.number)

    def _launch(self, made: Environment, folder: Path) -> subprocess.Popen[str]:
        backends = folder / "backends"
        backends.mkdir()
        made.lay_out_backends(backends)
        command = [
            str(made.server),
            f"--model-repository={self.repository.resolve()}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={self._regions}",
            "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in self.models),
            *(
                f"--{kind}-{key}={value}"
                for kind, port in zip(("http", "grpc", "metrics"), self._ports, strict=True)
                for key, value in (("address", self._host), ("port", port))
            ),
            "--allow-gpu-metrics=false",
            "--exit-on-error=false",
            f"--exit-timeout-secs={STOP_S}",
            *self._arguments,
        ]
        return subprocess.Popen(
            [sys.executable, "-I", "-c", _DIE_WITH_PARENT, *command],
            # Its stub imports our backend by the name `model`, from the working folder before its own.
            cwd=folder,
            env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | made.variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches us; we end it
        )

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        sink = self._log.open("a", encoding="utf-8") if self._log else None
        for line in process.stdout:
            self._said.append(line.rstrip())
            if sink:
                sink.write(line)
                sink.flush()
            if line[:1] in ("W", "E") and not _HARMLESS.search(line):
                logger.warning("tritonserver: %s", line.rstrip())
        process.stdout.close()
        if sink:
            sink.close()

    def _await_ready(self) -> None:
        until = time.monotonic() + START_S
        while not _answers(self.http, "v2/health/live"):
            if self.ended:
                raise ModelNotReady(self._ending())
            if time.monotonic() > until:
                raise ModelNotReady(f"Triton does not answer on {self.http} after {START_S} s")
            time.sleep(0.05)
        while any(entry.get("state") in ("LOADING", None) for entry in self._wanted()):
            if self.ended:
                raise ModelNotReady(self._ending())
            if time.monotonic() > until:
                raise ModelNotReady(f"Triton is still loading {', '.join(self.models)} after {START_S} s")
            time.sleep(0.05)
        failed = [entry for entry in self._wanted() if entry["state"] != "READY"]
        by_model = {entry["name"] for entry in self._wanted() if entry["state"] == "READY"}
        if missing := [model for model in self.models if model not in by_model]:
            reasons = {entry["name"]: entry.get("reason", "") for entry in failed}
            raise ModelNotReady(
                "Triton cannot load "
                + "; ".join(f"{model}: {reasons.get(model) or 'no such model'}" for model in missing)
            )

    def _wanted(self) -> list[dict[str, Any]]:
        return [entry for entry in self.index() if entry["name"] in self.models]

    def _ending(self) -> str:
        status = self._process.wait() if self._process else None
        time.sleep(0.1)  # its last words may still be on the way
        said = "\n  ".join(list(self._said)[-8:])
        return f"tritonserver ended with status {status}; the last it said:\n  {said}"


def servable_models(repository: Path) -> list[str]:
    """The models that Triton's onnxruntime backend can load; raises ModelNotReady where there is none."""
    found = sorted(
        config.parent.name
        for config in repository.glob(f"*/{CONFIG_FILE}")
        if 'backend: "onnxruntime"' in config.read_text(encoding="utf-8", errors="replace")
    )
    if not found:
        raise ModelNotReady(f"{repository}: no model for Triton's onnxruntime backend; {EXPORT_HINT}")
    return found


def load_model(address: str, model: str) -> None:
    """Have the server at HOST:PORT (HTTP) read a model's versions again; raises ModelNotReady."""
    ask(address, f"v2/repository/models/{model}/load", {})


def ask(address: str, path: str, body: object | None = None, timeout_s: float = START_S) -> Any:
    """GET, or POST a body as JSON; None where the answer is empty. Raises ModelNotReady."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(f"http://{address}/{path}", data), timeout=timeout_s) as response:
            content = response.read()
    except HTTPError as error:
        with error:
            content = error.read()
        try:
            reason = json.loads(content)["error"]
        except (ValueError, KeyError, TypeError):
            reason = error.reason
        raise ModelNotReady(f"Triton on {address}: {reason}") from error
    except (OSError, ValueError) as error:
        raise ModelNotReady(f"Triton on {address}: {getattr(error, 'reason', error)}") from error
    return json.loads(content) if content else None


def _answers(address: str, path: str) -> bool:
    try:
        ask(address, path, timeout_s=2)
    except ModelNotReady:
        return False
    return True


def sweep(prefix: str | None = None) -> None:
    """Remove a server's shared memory, or what those left whose parent was killed: that and their folders."""
    for place in (_SHARED_MEMORY, Path(tempfile.gettempdir())):
        for left in place.glob(f"{prefix or _OURS}*"):
            owner = left.name.removeprefix(_OURS).split("-")[0]
            if prefix or (owner.isdecimal() and not Path("/proc", owner).exists()):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)


def _free_ports(host: str, ports: Iterable[int]) -> list[int]:
    """Each port itself if it is free, any free one for 0; raises MalformedRequest where one is taken."""
    with ExitStack() as held:
        found = []
        for port in ports:
            probe = held.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise MalformedRequest(f"port {port} on {host}: {error.strerror}; name another") from error
            found.append(probe.getsockname()[1])
        return found
