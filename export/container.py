"""The command that builds an engine inside the Triton container that will serve it.

An engine is bound to the TensorRT version that built it, so the container's own libraries build it:
pip adds bindings of just their version (one megabyte), and what the export needs beside them.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final

CONTAINERS: Final = {"26.08": "11.2.1", "26.02": "10.15.1"}
"""Releases of nvcr.io/nvidia/tritonserver, the newest first, and the TensorRT in them; for reading only,
since the command asks the container itself. As seen by people who looked into the images (for 26.08
into nvcr.io/nvidia/tensorrt, which NVIDIA builds of the same parts). Every release is in
docs.nvidia.com, "Deep Learning Frameworks Support Matrix"."""

_VERSION: Final = (
    "trt=$(readlink -f \"$(ldconfig -p | sed -n 's/.*libnvinfer\\.so\\.[0-9]* .*=> //p' | head -n 1)\")"
    " || { echo 'no TensorRT in this container' >&2; exit 1; }"
)
"""/usr/lib/.../libnvinfer.so.11.2.1"""


def build_command(arguments: Sequence[str], release: str = "", here: Path | None = None) -> str:
    """A shell command: `alexnet export` with `arguments` in the container, run in the project's folder.

    Files are written as the calling user, and paths are the same inside and outside; folders that
    `arguments` name outside of `here` (default: the working directory) are mounted as well.
    `release`: one of CONTAINERS, default the newest.
    """
    inside = "; ".join(
        [
            "set -e",
            _VERSION,
            'pip install --quiet --user --constraint constraints.txt ".[export]" '
            '"tensorrt-cu13-bindings==${trt##*.so.}.*"',
            f"python3 alexnet.py export {shlex.join(arguments)}",
        ]
    )
    elsewhere = _outside(arguments, (here or Path.cwd()).resolve())
    return " ".join(
        [
            'docker run --rm --gpus all --user "$(id -u):$(id -g)"',
            '-e HOME=/var/tmp -e PIP_BREAK_SYSTEM_PACKAGES=1 -v "$PWD":"$PWD" -w "$PWD"',
            *(f"-v {shlex.quote(f'{folder}:{folder}')}" for folder in elsewhere),
            f"nvcr.io/nvidia/tritonserver:{release or next(iter(CONTAINERS))}-py3",
            f"sh -c {shlex.quote(inside)}",
        ]
    )


def _outside(arguments: Sequence[str], here: Path) -> list[Path]:
    """The folders among the arguments that the working directory does not hold, each once."""
    paths = [(here / argument).resolve() for argument in arguments]
    folders = [path if path.is_dir() else path.parent for path in paths if not path.is_relative_to(here)]
    return sorted(set(folders))
