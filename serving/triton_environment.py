"""Where `alexnet triton` finds a Triton server: a virtual environment of its own, made on first use.

The wheel of nvidia-pytriton holds a whole tritonserver for CPUs, with the Python backend. It wants
NumPy 1: with NumPy 2 in its environment its stub answers empty tensors without an error. So it lives
apart, in the user's cache folder, one environment for each set of versions.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from serving.errors import ModelNotReady

WHEEL: Final = "nvidia-pytriton==0.7.0"
"""tritonserver 2.51, of container 24.10. Installed without its dependencies: only the server is used."""

BACKEND: Final = Path(__file__).with_name("triton_onnxruntime")
_PYTHON: Final = f"{sys.version_info.major}.{sys.version_info.minor}"
_LIBPYTHON: Final = f"libpython{_PYTHON}.so.1.0"


@dataclass(frozen=True)
class Environment:
    """An environment that is complete."""

    folder: Path

    @property
    def packages(self) -> Path:
        return self.folder / "lib" / f"python{_PYTHON}" / "site-packages"

    @property
    def server(self) -> Path:
        return self.packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"

    @property
    def variables(self) -> dict[str, str]:
        """What the server's process needs: the stub takes the packages of the first python3 on PATH."""
        libraries = [str(self.packages / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
        return {
            "PATH": f"{self.folder / 'bin'}:{os.environ.get('PATH', os.defpath)}",
            "LD_LIBRARY_PATH": ":".join(filter(None, [*libraries, os.environ.get("LD_LIBRARY_PATH")])),
        }

    def lay_out_backends(self, folder: Path) -> None:
        """The Python backend with this Python's stub, and ours, named onnxruntime: copies, because the
        server refuses libraries that a link leads out of its backend directory."""
        triton = self.packages / "pytriton" / "tritonserver"
        python = folder / "python"
        python.mkdir()
        stub = triton / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"
        for file in (*(triton / "backends" / "python").glob("*.*"), stub):
            shutil.copy(file, python)
        shutil.copytree(BACKEND, folder / "onnxruntime")


def environment(say: Callable[[str], None] = lambda _: None) -> Environment:
    """The environment, made where it is absent; raises ModelNotReady with what this machine lacks."""
    _check_machine()
    requirements = ["numpy<2", f"onnxruntime=={version('onnxruntime')}"]
    key = hashlib.sha256(repr((WHEEL, requirements, sys.version, sys.base_prefix)).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "alexnet-serving"
    made = Environment(cache / f"triton-{key}")
    if made.folder.is_dir():
        return made
    say(f"making Triton's environment in {made.folder} (once; about half a minute) ...")
    beside = cache / f".triton-{key}-{os.getpid()}"
    try:
        venv.create(beside, clear=True, with_pip=True)
        _install(beside, "--no-deps", WHEEL)
        _install(beside, *requirements)
        stubs = Environment(beside).packages / "pytriton" / "tritonserver" / "python_backend_stubs"
        for stub in stubs.glob("*/triton_python_backend_stub"):
            stub.chmod(0o755)
        try:
            beside.rename(made.folder)
        except OSError:
            if not made.folder.is_dir():  # else another process was first, and ours is not needed
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return made


def _check_machine() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ModelNotReady(
            f"a local Triton server exists for Linux on x86-64, not for {sys.platform} on "
            f"{platform.machine()}; run NVIDIA's container instead (README, Triton)"
        )
    where = sysconfig.get_config_var("LIBDIR")
    found = subprocess.run(
        [sys.executable, "-c", f"import ctypes; ctypes.CDLL({_LIBPYTHON!r})"],
        env=os.environ | {"LD_LIBRARY_PATH": f"{where}:{os.environ.get('LD_LIBRARY_PATH', '')}"},
        capture_output=True,
        check=False,
    )
    if found.returncode != 0:
        raise ModelNotReady(
            f"Triton's Python backend needs the shared library {_LIBPYTHON}, which is not here; "
            f"install it (Debian, Ubuntu: apt-get install libpython{_PYTHON})"
        )


def _install(folder: Path, *requirements: str) -> None:
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or done.stderr.splitlines() or ["pip said nothing"])[-1].removeprefix("ERROR: ")
        raise ModelNotReady(f"Triton's environment cannot be made: {reason}")
