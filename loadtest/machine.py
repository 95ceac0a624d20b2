"""The machine and the versions that a measurement was made on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TOOLS = ("onnxruntime", "numpy", "pillow", "fastapi", "uvicorn")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":")[1].strip() for line in lines if "model name" in line)
    return next(named, platform.processor() or platform.machine())


def machine(tools: Sequence[str] = TOOLS) -> str:
    """One line: cores, processor, Python, and the installed of these tools."""
    versions = []
    for tool in tools:
        try:
            versions.append(f"{tool} {version(tool)}")
        except PackageNotFoundError:
            continue
    return f"{cores()} cores of {processor()}, Python {platform.python_version()}, {', '.join(versions)}"
