"""The servers that are compared: how each is started, asked, and which of its set-ups are tried.

Peers answer the ten-crop job with the stock export in an environment of their own. Each is set up in
the few ways that its documentation recommends, and the fastest on this machine takes part.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from machine import cores
from models import NAME, Models

PEER_FOLDER = "loadtest/peers"
BATCH = 4
"""Photographs in a peer's batch. More only wait longer: ten crops already fill a CPU's arithmetic."""


@dataclass(frozen=True)
class Setup:
    """One way to run a server."""

    says: str
    environment: dict[str, str]
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class System:
    """A server under test. `command(bin, port, setup)`; `ceiling` names the gateway's model behind it."""

    name: str
    says: str
    setups: tuple[Setup, ...]
    command: Callable[[Path, int, Setup], list[str]]
    path: str = "/classify"
    peer: bool = False
    ceiling: str | None = None


def _peer(workers: int, threads: int = 0, batch: int = 1, **more: str) -> dict[str, str]:
    numbers = {"PEER_WORKERS": workers, "PEER_THREADS": threads, "PEER_BATCH": batch}
    return {name: str(number) for name, number in numbers.items()} | more


def _fastapi(binaries: Path, port: int, setup: Setup) -> list[str]:
    command = [str(binaries / "uvicorn"), "--app-dir", PEER_FOLDER, "fastapi_app:app", "--port", str(port)]
    return [*command, "--log-level", "warning", *setup.arguments]


def _bentoml(binaries: Path, port: int, _: Setup) -> list[str]:
    command = [str(binaries / "bentoml"), "serve", "bentoml_app:Classifier", "--working-dir", PEER_FOLDER]
    return [*command, "--host", "127.0.0.1", "--port", str(port)]


def _script(file: str) -> Callable[[Path, int, Setup], list[str]]:
    return lambda binaries, port, _: [str(binaries / "python"), f"{PEER_FOLDER}/{file}"]


def peers() -> list[System]:
    """Each with its set-ups for this machine's cores."""
    n = cores()
    one = "one copy on all cores"
    many = f"{n} copies, a core each"
    batched = f"{one}, batches of up to {BATCH}"
    return [
        System(
            "fastapi",
            "the naive way: FastAPI, plain def, stock torch.onnx.export",
            (
                Setup(f"1 worker, {one}, 40 threads", _peer(1)),
                Setup(f"uvicorn --workers {n}: {many}", _peer(n, 1), ("--workers", str(n))),
            ),
            _fastapi,
            peer=True,
        ),
        System(
            "litserve",
            "LitServe, stock export",
            (
                Setup(f"workers_per_device=1: {one}", _peer(1)),
                Setup(f"workers_per_device={n}: {many}", _peer(n, 1)),
                Setup(f"max_batch_size={BATCH}, batch_timeout=0.02: {batched}", _peer(1, batch=BATCH)),
            ),
            _script("litserve_app.py"),
            peer=True,
        ),
        System(
            "bentoml",
            "BentoML, stock export",
            (
                Setup(f"workers=1, threads={n}: {one}", _peer(1, PEER_SERVICE_THREADS=str(n))),
                Setup(f"workers={n}: {many}", _peer(n, 1)),
                Setup(f"batchable, max_batch_size={BATCH}: {batched}", _peer(1, batch=BATCH)),
            ),
            _bentoml,
            peer=True,
        ),
        System(
            "ray",
            "Ray Serve, stock export",
            (
                Setup(f"num_replicas=1, num_cpus={n}: {one}", _peer(1)),
                Setup(f"num_replicas={n}, num_cpus=1: {many}", _peer(n, 1)),
                Setup(f"@serve.batch(max_batch_size={BATCH}): {batched}", _peer(1, batch=BATCH)),
            ),
            _script("ray_app.py"),
            peer=True,
        ),
    ]


def ours(made: Models) -> list[System]:
    """This gateway, as `alexnet serve` starts it, with no knob turned."""
    as_is = (Setup("defaults", {}),)

    def gateway(model: str) -> Callable[[Path, int, Setup], list[str]]:
        of = ["--repository", str(made.repository), "--model", model]
        return lambda _, port, __: [sys.executable, "alexnet.py", "serve", "--port", str(port), *of]

    def with_triton(model: str) -> Callable[[Path, int, Setup], list[str]]:
        of = ["--repository", str(made.repository), "--model", model]
        script = "loadtest/gateway_and_triton.py"
        return lambda _, port, __: [sys.executable, script, "--port", str(port), *of]

    fp32, int8, ten = NAME, f"{NAME}_int8", "/classify?crops=ten"
    return [
        System("fp32", "this gateway, FP32", as_is, gateway(fp32), ten, ceiling=fp32),
        System("int8", "this gateway, INT8", as_is, gateway(int8), ten, ceiling=int8),
        System("auto", "this gateway, INT8, crops=auto", as_is, gateway(int8), "/classify?crops=auto"),
        System("triton", "this gateway over Triton, FP32", as_is, with_triton(fp32), ten, ceiling=fp32),
        System("triton_int8", "this gateway over Triton, INT8", as_is, with_triton(int8), ten, ceiling=int8),
    ]


DEFAULT = ("fastapi", "litserve", "bentoml", "ray", "fp32", "int8", "auto", "triton")


def chosen(names: str, made: Models) -> list[System]:
    """Those named with commas; raises SystemExit for one that is none."""
    known = {system.name: system for system in (*peers(), *ours(made))}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise SystemExit(f"--only {names}: one or more of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(wanted)]
