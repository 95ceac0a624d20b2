"""What training wants to know of the machine, and asks of it."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from pathlib import Path

import torch
from torch import Tensor


def faster_precision() -> str:
    """`bf16` where this machine's matrix product gains from it, else `fp32`; measured, 0.2 s.

    With AMX or AMD's double-rate AVX512-BF16 it gains two to eight times; an Intel core with
    AVX512-BF16 and no AMX loses (measured: half the rate of FP32).
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    a, b = torch.randn(512, 2048), torch.randn(2048, 2048)

    def seconds(x: Tensor, y: Tensor) -> float:
        for _ in range(2):
            x @ y
        started = time.perf_counter()
        for _ in range(5):
            x @ y
        return time.perf_counter() - started

    return "bf16" if seconds(a.bfloat16(), b.bfloat16()) < 0.7 * seconds(a, b) else "fp32"


def memory_bytes() -> float:
    """This machine's memory, or what its container may have of it."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8e9
    try:
        return min(pages, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return float(pages)


def keep_freed_memory() -> None:
    """Let glibc reuse freed activations instead of returning them to the kernel after each step.

    A step frees and allocates hundreds of MB; page faults on them cost a quarter of the time
    (measured: 44 -> 60 images/s). mallopt(3): no mmap for large blocks, never trim the heap.
    """
    if sys.platform == "linux":
        m_trim_threshold, m_mmap_max = -1, -4
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, -1)
        except (OSError, AttributeError):
            return  # musl: slower, not wrong


def environment(processes: int = 1) -> dict[str, str]:
    """What a run ran on, for its readers."""
    found = {
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "processes": str(processes),
    }
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    """Its name, which Linux knows and Python does not."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
