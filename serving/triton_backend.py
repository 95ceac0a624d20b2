"""The engine is a Triton server, or several: one gRPC channel, watched for as long as the app lives.

Over tritonclient's protobuf stubs and grpc.aio, not over its client class: that one hides the status
code in a string and, for each request, copies the crops once more.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable
from typing import Any, Final

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from serving.backends import Inference, Model, ModelInfo
from serving.contract import CHANNELS, CROP_COUNT, CROP_SIZE
from serving.errors import DeadlineExceeded, EngineFailed, ModelNotReady, Overloaded, ServingError
from serving.preprocess import Pixels
from serving.trail import onward
from serving.triton_messages import (
    check_config,
    check_metadata,
    infer_request,
    labels_request,
    read_labels,
    read_probabilities,
)
from serving.triton_target import grpc_target

PROBE_EVERY_S: Final = 0.5
"""Between two looks at the model, by which a reload, a loss and a return are seen. What is small enough
not to matter needs no growing pauses; those are gRPC's, between its attempts to connect."""

PROBE_TIMEOUT_S: Final = 1.0
MISSES: Final = 2
"""Looks in a row that must fail before a model is not ready: with two servers every other look meets
the one that hangs."""

DESCRIBE_TIMEOUT_S: Final = 10.0
"""For the first inferences of a version, which may wait behind others or for a GPU to plan them."""

RETRY_AFTER_S: Final = (0.02, 0.05, 0.1, 0.2)
"""Pauses before an inference is tried again. It is idempotent, and the lost connection's successor or
the other server is there at once."""

LABEL_TRIES: Final = 16
"""Requests until one meets a server with the version whose labels are wanted: of two, all but surely."""

LOOK_ID: Final = "gateway-look"
"""The id of the gateway's own inferences, by which they are told apart in Triton's log."""

VERSIONS_KEPT: Final = 8
"""Versions whose labels are remembered, for answers under way while several reloads pass."""

_LOST: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})
_ABSENT: Final = "unknown model"  # Triton's text, NOT_FOUND for a name, UNAVAILABLE for its versions
_FULL_QUEUE: Final = "exceeds maximum queue size"
_EXPIRED_IN_QUEUE: Final = "request timeout expired"

_NOISE: Final = np.random.default_rng(0).integers(
    0, 256, (max(CROP_COUNT.values()), CROP_SIZE, CROP_SIZE, CHANNELS), np.uint8
)

logger = logging.getLogger("alexnet.model")


def channel_options(keepalive_s: float) -> list[tuple[str, Any]]:
    """gRPC's settings for one channel over every server.

    No retryPolicy: it goes by the status alone, and a full queue is UNAVAILABLE as a lost connection is.
    """
    service: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    milliseconds = int(1000 * keepalive_s)
    return [
        ("grpc.service_config", json.dumps(service)),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        # A stopped server's kernel still takes what is sent: only an unanswered ping tells. The first two
        # settings alone wait a minute for the answer where other requests go on being sent (measured, a
        # stopped server and 50 requests a second: lost after 2.4 s with the third, never within 10 s
        # without). Pings go out while calls are under way, and the answers to the gateway's looks in
        # between keep the server from calling it abuse.
        ("grpc.keepalive_time_ms", milliseconds),
        ("grpc.keepalive_timeout_ms", milliseconds),
        ("grpc.http2.ping_timeout_ms", milliseconds),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),  # how long one attempt may take
        ("grpc.max_reconnect_backoff_ms", 500),
        ("grpc.dns_min_time_between_resolutions_ms", 1000),
    ]


async def ready_models(servers: str) -> list[str]:
    """Names of the models that are ready there; none where no server answers."""
    async with grpc.aio.insecure_channel(grpc_target(servers)) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            index = await stub.RepositoryIndex(
                service_pb2.RepositoryIndexRequest(ready=True), timeout=PROBE_TIMEOUT_S
            )
        except grpc.aio.AioRpcError:
            return []
    return sorted({model.name for model in index.models})


class TritonBackend:
    """One model of a Triton server. It may be absent at the start and go away later: it is waited for."""

    def __init__(self, servers: str, name: str, *, concurrency: int, keepalive_s: float = 2.0) -> None:
        """`servers`: HOST:PORT[,HOST:PORT...]; raises ValueError as `grpc_target` does."""
        self._target, self._name, self._keepalive_s = grpc_target(servers), name, keepalive_s
        self._concurrency = concurrency
        self._models: dict[str, Model] = {}  # by version
        self._listed: frozenset[str] = frozenset()
        self._newest = ""  # version that answered the last look
        self._answered_s = -math.inf
        self._fault: ModelNotReady | None = ModelNotReady(
            f"the model {name} was not yet seen at the Triton server; try again in a moment"
        )
        self._describing = asyncio.Lock()
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def takes_squares(self) -> bool:
        return False  # config.pbtxt names the crops' shape

    @property
    def concurrency(self) -> int:
        return self._concurrency

    @property
    def batch_crops(self) -> int:
        return 0

    @property
    def model(self) -> Model:
        if self._fault is not None:
            raise ModelNotReady(str(self._fault))
        return self._models[self._newest]

    async def start(self) -> None:
        """Look once, then keep looking. Raises nothing: a server that is not there yet is waited for."""
        if self._watcher is not None:
            return
        self._channel = grpc.aio.insecure_channel(self._target, channel_options(self._keepalive_s))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        await self._look_and_note(misses=MISSES)
        self._watcher = asyncio.create_task(self._watch())

    async def infer(self, crops: Pixels, deadline_s: float | None = None) -> Inference:
        """uint8 [N, 224, 224, 3] -> float32 [N, classes], all of one model version.

        Raises Overloaded, ModelNotReady, DeadlineExceeded or EngineFailed.
        """
        response = await self._infer(infer_request(self._name, crops), deadline_s)
        probabilities = read_probabilities(response, len(crops))
        model = self._models.get(response.model_version)
        classes = probabilities.shape[1]
        if model is None or classes != len(model.labels):  # reloaded since the last look
            model = await self._learn(response.model_version, classes, known=model)
        if response.model_version != self._newest:
            self._listed = frozenset()  # look again: the answer may be older, or newer, than the last look
        self._answered_s = asyncio.get_running_loop().time()
        return Inference(probabilities, model)

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close(grace=None)
        self._fault = ModelNotReady("the gateway is closing")

    async def _infer(self, request: Any, deadline_s: float | None) -> Any:
        """ModelInfer, tried again where the connection was lost and there is time left."""
        clock = asyncio.get_running_loop().time
        for pause_s in (*RETRY_AFTER_S, None):
            try:
                left_s = None if deadline_s is None else max(0.0, deadline_s - clock())
                return await self._stub.ModelInfer(request, timeout=left_s, metadata=onward())
            except grpc.aio.AioRpcError as error:
                if pause_s is None or not _worth_another_try(error):
                    raise self._told(error) from error
            await asyncio.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    async def _watch(self) -> None:
        misses = 0
        while True:
            await asyncio.sleep(PROBE_EVERY_S)
            misses = await self._look_and_note(misses + 1)

    async def _look_and_note(self, misses: int) -> int:
        """Look; at the `misses`-th failure in a row the model is not ready. Returns how many there are."""
        try:
            await self._look()
        except Overloaded:
            return 0  # alive; the first inference of a new version is tried again at the next look
        except Exception as error:  # noqa: BLE001 - whatever a server may answer, the looking goes on
            busy = asyncio.get_running_loop().time() - self._answered_s < PROBE_TIMEOUT_S
            if isinstance(error, DeadlineExceeded) and busy:
                return 0
            if misses >= MISSES or self._fault is not None:
                self._note_fault(error)
            return misses
        if self._fault is not None:
            self._fault = None
            logger.info("version %s of %s is ready at %s", self._newest, self._name, self._target)
        return 0

    def _note_fault(self, error: Exception) -> None:
        known = isinstance(error, ServingError)
        reason = str(error) if known else "the gateway's log has the reason"
        if not isinstance(error, ModelNotReady):
            reason = f"the model {self._name} does not answer as it should: {reason}"
        if reason != str(self._fault):  # told once, not at each look
            cause = error.__cause__
            told = f" ({cause.details()})" if isinstance(cause, grpc.aio.AioRpcError) else ""
            logger.warning("not ready: %s%s", reason, told, exc_info=None if known else error)
        self._fault = ModelNotReady(reason)

    async def _look(self) -> None:
        """Ask which versions Triton has; where they changed, or after a fault, learn the one that answers."""
        metadata = await self._ask(
            self._stub.ModelMetadata, service_pb2.ModelMetadataRequest(name=self._name), PROBE_TIMEOUT_S
        )
        classes = check_metadata(metadata)
        listed = frozenset(metadata.versions)
        if self._fault is None and listed == self._listed:
            return
        answer = await self._first(infer_request(self._name, _NOISE, request_id=LOOK_ID))
        read_probabilities(answer, len(_NOISE))
        version = answer.model_version
        await self._learn(version, classes, known=self._models.get(version))
        if self._fault is None and version != self._newest:
            logger.info("version %s is served now, %s before", version, self._newest)
        self._listed, self._newest = listed, version

    async def _learn(self, version: str, classes: int, known: Model | None = None) -> Model:
        """The version's Model, asked of Triton unless others did so since it was `known`."""
        async with self._describing:
            model = self._models.get(version)
            if model is None or model is known:
                model = await self._describe(version, classes)
                self._models.pop(version, None)  # to the end of the order
                self._models[version] = model
                if len(self._models) > VERSIONS_KEPT:
                    del self._models[next(iter(self._models))]
            return model

    async def _describe(self, version: str, classes: int) -> Model:
        """What a version's outputs mean.

        The requests name no version: of several servers in the middle of a rollout not each has it.
        """
        request = service_pb2.ModelConfigRequest(name=self._name)
        precision = check_config((await self._ask(self._stub.ModelConfig, request, PROBE_TIMEOUT_S)).config)
        for _ in range(LABEL_TRIES):
            answer = await self._first(labels_request(self._name, _NOISE[:1], classes, LOOK_ID))
            if answer.model_version == version:
                info = ModelInfo(self._name, version, precision, "triton")
                return Model(info, read_labels(answer, classes))
        raise ModelNotReady(f"version {version} of the model {self._name} is being replaced; try again")

    async def _first(self, request: Any) -> Any:
        """An inference that may be a version's first."""
        return await self._infer(request, asyncio.get_running_loop().time() + DESCRIBE_TIMEOUT_S)

    async def _ask(self, call: Callable[..., Any], request: Any, timeout_s: float) -> Any:
        """One call that is no inference; raises as `infer`."""
        try:
            return await call(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._told(error) from error

    def _told(self, error: grpc.aio.AioRpcError) -> ServingError:
        """The project's error for gRPC's, whose text, with its addresses, stays in the log."""
        fault = _as_ours(error, self._name)
        if isinstance(fault, EngineFailed) and self._fault is None:  # else told once, not at each look
            logger.error("Triton failed: %s %s", error.code().name, error.details())
        return fault


def _worth_another_try(error: grpc.aio.AioRpcError) -> bool:
    text = (error.details() or "").lower()
    return error.code() in _LOST and _FULL_QUEUE not in text and _EXPIRED_IN_QUEUE not in text


def _as_ours(error: grpc.aio.AioRpcError, name: str) -> ServingError:
    """gRPC's status and Triton's text -> the project's errors."""
    code, text = error.code(), (error.details() or "").lower()
    if _FULL_QUEUE in text:
        return Overloaded("the model server's queue is full; try again in a moment")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED or _EXPIRED_IN_QUEUE in text:
        return DeadlineExceeded("the model server did not answer in time")
    if code is grpc.StatusCode.NOT_FOUND or _ABSENT in text:
        return ModelNotReady(f"the Triton server has no model {name!r} ready")
    if code in _LOST:
        return ModelNotReady("no Triton server can be reached; try again in a moment")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return EngineFailed("the server that answers at the Triton address is no Triton")
    # INVALID_ARGUMENT as well: crops are cut here, so it is the model that left the contract, not the client.
    return EngineFailed(f"the model server failed ({code.name}); the gateway's log has the reason")
