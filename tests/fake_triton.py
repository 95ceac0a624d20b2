"""A Triton server of this process, as far as the gateway and the scorer see one: faults on request.

A threaded gRPC server, so that it shares no event loop with what is tested.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Self

import grpc
import numpy as np
from support import LABELS, FakeBackend
from tritonclient.grpc import service_pb2, service_pb2_grpc

from serving.contract import MAX_BATCH
from serving.postprocess import Label


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """One model over FakeBackend's formula. Attributes may be changed while it runs.

    `before` runs at each inference and `corrupt` may change its answer, except at those by which the
    gateway looks at the model, which have an id; unless `looks_too`.
    """

    def __init__(self, labels: tuple[Label, ...] = LABELS, name: str = "alexnet") -> None:
        self.name, self.labels, self.version, self.versions = name, labels, "7", ["7"]
        self.engines = {"7": FakeBackend(labels)}
        self.label_lines = [label.line() for label in labels]
        self.precision = "fp32"
        self.input = ("images", "UINT8", [-1, 224, 224, 3])
        self.max_batch = MAX_BATCH
        self.before: Callable[[grpc.ServicerContext], None] = lambda _: None
        self.corrupt: Callable[[Any], None] = lambda _: None
        self.looks_too = False
        self.batches: list[int] = []
        self.deadlines: list[float | None] = []
        self.ended_early = threading.Semaphore(0)  # released for each call that its caller gave up
        self.port = 0
        self._server: grpc.Server | None = None

    def start(self) -> None:
        """Listen; on the port of the last time, if there was one."""
        self._server = grpc.server(
            ThreadPoolExecutor(64),
            options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)],
        )
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        """Break every connection."""
        if self._server is not None:
            self._server.stop(grace=None).wait(10)
            self._server = None

    def load(self, version: str, seed: int) -> None:
        """A new version answers from now on."""
        engine = FakeBackend(self.labels)
        engine.reload(version, seed)
        self.engines[version] = engine
        self.versions, self.version = [*self.versions, version], version

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def RepositoryIndex(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        response = service_pb2.RepositoryIndexResponse()
        for version in self.versions:
            response.models.add(name=self.name, version=version, state="READY")
        return response

    def ModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self._check(request.name, request.version, context)
        response = service_pb2.ModelMetadataResponse(name=self.name, versions=self.versions)
        name, datatype, shape = self.input
        response.inputs.add(name=name, datatype=datatype, shape=shape)
        response.outputs.add(name="probabilities", datatype="FP32", shape=[-1, len(self.labels)])
        return response

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self._check(request.name, request.version, context)
        response = service_pb2.ModelConfigResponse()
        response.config.name, response.config.max_batch_size = self.name, self.max_batch
        if self.precision:
            response.config.parameters["precision"].string_value = self.precision
        return response

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        version = request.model_version or self.version
        self._check(request.model_name, version, context)
        counts = self.looks_too or not request.id
        if counts:
            self.deadlines.append(context.time_remaining())
            done = threading.Event()
            context.add_callback(lambda: None if done.is_set() else self.ended_early.release())
            try:
                self.before(context)
            finally:
                done.set()
        (tensor,) = request.inputs
        crops = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(tensor.shape)
        probabilities = self.engines[version].probabilities(crops)
        response = service_pb2.ModelInferResponse(model_name=self.name, model_version=version)
        if "classification" in request.outputs[0].parameters:
            self._classify(response, probabilities)
            return response
        response.outputs.add(name="probabilities", datatype="FP32", shape=probabilities.shape)
        response.raw_output_contents.append(probabilities.tobytes())
        if counts:
            self.batches.append(len(crops))
            self.corrupt(response)
        return response

    def _check(self, name: str, version: str, context: grpc.ServicerContext) -> None:
        if name != self.name:
            context.abort(
                grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{name}' is not found"
            )
        if version and version not in self.versions:
            context.abort(
                grpc.StatusCode.UNAVAILABLE,
                f"Request for unknown model: '{name}' version {version} is not at ready state",
            )

    def _classify(self, response: Any, probabilities: np.ndarray) -> None:
        """Each class as 'probability:index:label', likeliest first; without its label where there is none."""
        raw = b""
        for row in probabilities:
            for index in np.argsort(-row):
                entry = f"{row[index]:f}:{index}"
                if index < len(self.label_lines):
                    entry += f":{self.label_lines[index]}"
                raw += struct.pack("<I", len(entry.encode())) + entry.encode()
        response.outputs.add(name="probabilities", datatype="BYTES", shape=probabilities.shape)
        response.raw_output_contents.append(raw)


@contextmanager
def fake_triton(**changes: Any) -> Iterator[FakeTriton]:
    """A server that listens, with `changes` to its attributes."""
    server = FakeTriton()
    for name, value in changes.items():
        setattr(server, name, value)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class FakeTritonProcess:
    """The same in a process of its own, to be killed or stopped: `LocalTriton` as far as tests use it."""

    def __init__(self, version: str) -> None:
        self._version, self._port = version, 0
        self._process: subprocess.Popen[str] | None = None

    @property
    def grpc(self) -> str:
        """HOST:PORT"""
        return f"127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Listen; on the port of the last time, if there was one."""
        command = [sys.executable, __file__, self._version, str(self._port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._port = int(self._process.stdout.readline())

    def kill(self) -> None:
        """End it as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def full_queue(context: grpc.ServicerContext) -> None:
    """What Triton answers when max_queue_size requests wait."""
    context.abort(grpc.StatusCode.UNAVAILABLE, "[request id: <id_unknown>] Exceeds maximum queue size")


def main() -> None:
    """Serve the version on the port given, print the port, until killed."""
    server = FakeTriton()
    server.load(sys.argv[1], seed=0)
    server.versions, server.port = [sys.argv[1]], int(sys.argv[2])
    server.start()
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main()
