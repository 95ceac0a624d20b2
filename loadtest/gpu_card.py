"""The card: what it is called, and what it reaches in a large product and a large copy."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from gpu_events import Stream, timed
from gpu_work import Rates

DTYPES: Final = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
SIDE: Final = 8192
SMALLEST_SIDE: Final = 1024
COPIED_BYTES: Final = 2**30
"""Several times the largest card's cache."""
TF32_CAPABILITY: Final = 8


class AbsentError(Exception):
    """A row that cannot be measured here; the text says why, and what it takes."""


def need_cuda() -> None:
    """Raises AbsentError where torch sees no card."""
    if torch.cuda.is_available():
        return
    seen = "sees no CUDA device" if torch.version.cuda else "is built without CUDA"
    raise AbsentError(
        f"bench-gpu needs an NVIDIA GPU, its driver, and a torch built with CUDA: torch {torch.__version__} "
        f"{seen}. Nothing was measured."
    )


def need_precision(precision: str, capability: tuple[int, int], has_bf16: bool) -> None:
    """Raises AbsentError where a card has no such arithmetic, and torch would quietly use another."""
    told = f"compute capability {capability[0]}.{capability[1]}"
    if precision == "tf32" and capability[0] < TF32_CAPABILITY:
        raise AbsentError(f"no TF32 on a card of {told}; 8.0 and later have it")
    if precision == "bf16" and not has_bf16:
        raise AbsentError(f"no bf16 on a card of {told}")


def card() -> dict[str, str]:
    """The current one, its driver and torch's libraries."""
    of = torch.cuda.get_device_properties()
    return {
        "card": of.name,
        "compute capability": f"{of.major}.{of.minor}",
        "memory": f"{of.total_memory / 1e9:.0f} GB",
        "multiprocessors": str(of.multi_processor_count),
        "L2 cache": f"{of.L2_cache_size / 1e6:.0f} MB",
        "driver": driver(),
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
    }


def driver(command: str = "nvidia-smi") -> str:
    """Its version, which torch does not tell."""
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, check=True, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown (no nvidia-smi)"
    return told.splitlines()[0].strip() if told.strip() else "unknown"


@contextmanager
def arithmetic(precision: str, *, search: bool = False) -> Iterator[None]:
    """FP32 numbers are multiplied as TF32 in the block for `tf32`, exactly for all else.

    With `search` cuDNN tries its algorithms on each size first. By torch's older switches: with the newer
    (fp32_precision, torch 2.13) torch's own readers of the older ones raise.
    """
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    products.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    cudnn.benchmark = search
    try:
        yield
    finally:
        products.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def matrix_rate(stream: Stream, precision: str, seconds: float, side: int = SIDE) -> float:
    """FLOP/s of a square product of random numbers, as large as memory allows."""
    try:
        a, b = torch.randn(2, side, side, dtype=DTYPES[precision], device=stream.device)
        out = torch.empty_like(a)
        with arithmetic(precision):
            taken = timed(lambda: torch.mm(a, b, out=out), stream, seconds)
    except torch.OutOfMemoryError:
        if side <= SMALLEST_SIDE:
            raise
    else:
        return 2 * side**3 / taken.median_s
    return matrix_rate(stream, precision, seconds, side // 2)


def copy_rate(stream: Stream, seconds: float, size: int = COPIED_BYTES) -> float:
    """Bytes/s of a copy on the card, counted as read and as written."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=stream.device)
    to = torch.empty_like(source)
    return 2 * size / timed(lambda: to.copy_(source), stream, seconds).median_s


def card_rates(
    stream: Stream,
    seconds: float,
    capability: tuple[int, int],
    has_bf16: bool,
    side: int = SIDE,
    copied_bytes: int = COPIED_BYTES,
) -> tuple[dict[str, Rates], dict[str, str]]:
    """Those of each precision, and why where there is none."""
    bytes_s = copy_rate(stream, seconds, copied_bytes)
    found, absent = {}, {}
    for precision in DTYPES:
        try:
            need_precision(precision, capability, has_bf16)
        except AbsentError as reason:
            absent[precision] = str(reason)
            continue
        found[precision] = Rates(matrix_rate(stream, precision, seconds, side), bytes_s)
    return found, absent
