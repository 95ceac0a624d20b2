"""A version handed to Triton servers that run: each is told to load it, then asked its golden images.

For servers with `--model-control-mode=explicit` over the same repository. Triton loads beside what it
serves: requests are answered by the old version until the new one is ready.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from serving.errors import DeadlineExceeded, EngineFailed, ModelNotReady, Overloaded, UnknownModel
from serving.triton_backend import TritonBackend
from serving.triton_target import addresses, grpc_target
from serving.verify import Verdict, verify_backend

CONNECT_S: Final = 5.0
LOAD_S: Final = 300.0
"""An engine's first load with its warm-up takes minutes on a busy GPU."""

VERIFY_S: Final = 60.0
PAUSES_S: Final = (0.5, 1.0, 2.0)
"""A server under load may refuse the first golden image for its full queue."""

ADMIN_HEADER: Final = "triton-grpc-protocol-admin-key"
"""Sent where Triton restricts the repository's calls: --grpc-restricted-protocol=...:admin-key=VALUE."""


async def load_everywhere(servers: list[str], version: Path, admin_key: str = "") -> list[str]:
    """Have each server at HOST:PORT serve repository/model/number; returns what went wrong, one text each.

    One that is not there or refuses is passed over. One that answers otherwise than the version did
    when it was exported ends it: the others go on with what they have.
    """
    faults: list[str] = []
    places: list[str] = []
    for server in servers:
        try:
            places += await asyncio.to_thread(addresses, server)
        except OSError as error:
            faults.append(f"Triton on {server}: {error.strerror}")
    for index, place in enumerate(places):
        try:
            await load_version(place, version, admin_key)
        except ModelNotReady as error:
            faults.append(f"Triton on {place}: {error}")
        except EngineFailed as error:
            rest = ", ".join(places[index + 1 :])
            untold = f"; not told to load it: {rest}" if rest else ""
            return [*faults, f"Triton on {place}: {error}{untold}"]
    return faults


async def load_version(server: str, version: Path, admin_key: str = "") -> None:
    """Have one server load repository/model/number, and confirm that it answers as it should.

    Raises ModelNotReady where it did not load it, EngineFailed where its answers are others.
    """
    model = version.parent.name
    await _load(server, model, admin_key)
    verdict = await _verify(server, model, version.parent.parent)
    if verdict.version != version.name:
        raise ModelNotReady(f"{model} version {verdict.version} answers there; is it the same repository?")
    if verdict.broken:
        raise EngineFailed(f"{model} version {verdict.version} answers otherwise there ({verdict.broken})")


async def _verify(server: str, model: str, repository: Path) -> Verdict:
    """Ask for the golden images; raises ModelNotReady where they go unanswered."""
    for pause_s in (*PAUSES_S, None):
        backend = TritonBackend(server, model, concurrency=1)  # one that was closed is not started again
        try:
            async with asyncio.timeout(VERIFY_S):
                return await verify_backend(backend, repository)
        except TimeoutError as error:
            raise ModelNotReady(f"no answer from {model} in {VERIFY_S:g} s") from error
        except UnknownModel as error:
            raise ModelNotReady(f"asked in vain for its golden images: {error}") from error
        except (Overloaded, ModelNotReady, DeadlineExceeded) as error:
            if pause_s is None:
                raise ModelNotReady(str(error)) from error
        await asyncio.sleep(pause_s)
    raise AssertionError("the last try returns or raises")


async def _load(server: str, model: str, admin_key: str) -> None:
    metadata = ((ADMIN_HEADER, admin_key),) if admin_key else None
    async with grpc.aio.insecure_channel(grpc_target(server)) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            await stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=CONNECT_S)
            request = service_pb2.RepositoryModelLoadRequest(model_name=model)
            await stub.RepositoryModelLoad(request, timeout=LOAD_S, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise ModelNotReady(_told(error)) from error


def _told(error: grpc.aio.AioRpcError) -> str:
    """One line: a Python backend's fault comes with its traceback, which is in the server's own log."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer ({CONNECT_S:g} s to be reached, {LOAD_S:g} s to load)"
    return next(iter((error.details() or "").strip().splitlines()), error.code().name)
