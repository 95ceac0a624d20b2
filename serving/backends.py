"""Engines that answer the contract: crops uint8 [N, 224, 224, 3] -> probabilities [N, classes].

One that takes squares answers uint8 [1, 256, 256, 3] with what it says of the square's ten crops, sooner.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import onnxruntime

from serving.contract import (
    CHANNELS,
    CROP_COUNT,
    CROP_SIZE,
    INPUT_NAME,
    OUTPUT_NAME,
    PLAN_SUFFIX,
    RESIZE_SIZE,
    Crops,
)
from serving.errors import ModelNotReady, ServingError
from serving.postprocess import Label, Probabilities
from serving.preprocess import Pixels, cut_crops, is_square
from serving.repository import EXPORT_HINT, Version, latest_version, newest_state

logger = logging.getLogger("alexnet.model")


@dataclass(frozen=True)
class ModelInfo:
    """Which model answers, as told in every answer."""

    name: str
    version: str
    precision: str
    backend: str


@dataclass(frozen=True)
class Model:
    """A loaded model: what it is called, what its outputs mean, where it comes from."""

    info: ModelInfo
    labels: tuple[Label, ...]
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Inference:
    """What an engine answered, and the model that did: `Backend.model` may be a newer one by now."""

    probabilities: Probabilities  # float32 [N, classes]
    model: Model


class Backend(Protocol):
    """What the gateway needs of an engine. A test passes a fake one in."""

    @property
    def concurrency(self) -> int:
        """Inferences that may run at the same time; more wait in the gateway's queue."""

    @property
    def batch_crops(self) -> int:
        """Up to which requests that wait are joined into one inference; 0: the engine does that itself."""

    @property
    def model(self) -> Model:
        """The model that new requests meet; raises ModelNotReady while there is none."""

    async def start(self) -> None:
        """Load and answer one inference of each size; raises ModelNotReady.

        An engine that may come by itself is waited for in the background instead.
        """

    @property
    def takes_squares(self) -> bool:
        """Whether `infer` takes uint8 [1, 256, 256, 3] for the ten crops of that square."""

    async def infer(self, crops: Pixels, deadline_s: float | None = None) -> Inference:
        """uint8 [N, 224, 224, 3] -> float32 [N, classes], all of one model version.

        `deadline_s`: when the caller gives up, on the event loop's clock; it cancels the call then.
        A remote engine passes it on, so that its server drops what nobody waits for.
        """

    async def close(self) -> None:
        """Free what `start` took."""


BESIDE_MAX_BYTES: Final = 100_000_000
"""Of a model's file, up to which it is opened a second time for inferences side by side. INT8 (57 MB) gains
a sixth with 8 clients for 80 MB of memory; FP32 at full width (228 MB) gains one in a hundred for 290 MB."""


class OnnxRuntimeBackend:
    """ONNX Runtime in this process: every core for a request that is alone, one core each for several.

    Side by side, single-threaded runs do not wait for each other at every operator, nor for the
    decoders that take a core in between. A large model is opened once, and answers one after the other.

    With `watch_s` the repository is looked at every so many seconds, and the version that is newest
    then is served from then on: one published, or the one left after a rollback. It is loaded and asked
    its golden images beside the old one, which finishes what it began. One that cannot be loaded is
    logged, and the old one stays.
    """

    def __init__(self, repository: Path, name: str, threads: int, watch_s: float = 0) -> None:
        self._repository, self._name, self._threads = repository, name, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="infer")
        self._watch_s = watch_s
        self._watcher: asyncio.Task[None] | None = None
        self._loaded: _Loaded | None = None
        self._running = 0

    @property
    def concurrency(self) -> int:
        return self._threads if self._loaded is None or self._loaded.beside else 1

    @property
    def batch_crops(self) -> int:
        return max(CROP_COUNT.values())  # more gain nothing

    @property
    def takes_squares(self) -> bool:
        return True  # a version without such a graph is given the crops

    @property
    def model(self) -> Model:
        return self._ready().model

    async def start(self) -> None:
        if self._loaded is not None:
            return
        seen = newest_state(self._repository, self._name)
        self._loaded = await self._load()
        if self._watch_s:
            self._watcher = asyncio.create_task(self._watch(seen))

    async def _load(self) -> _Loaded:
        """In a thread of its own, so that the threads that infer go on."""
        return await asyncio.to_thread(
            lambda: load(latest_version(self._repository, self._name), self._threads)
        )

    async def _watch(self, seen: object) -> None:
        while True:
            await asyncio.sleep(self._watch_s)
            now = newest_state(self._repository, self._name)
            if now == seen:
                continue
            seen = now  # also where loading fails: not tried again before something changes
            was = self.model.info.version
            try:
                self._loaded = await self._load()
            except Exception as error:  # noqa: BLE001  whatever is wrong with the new one, the old one serves
                logger.error("version %s goes on being served: %s", was, error)
            else:
                logger.info("version %s is served now, %s before", self.model.info.version, was)

    async def infer(self, crops: Pixels, deadline_s: float | None = None) -> Inference:
        loaded = self._ready()
        async with AsyncExitStack() as stack:
            if loaded.beside is None:
                await stack.enter_async_context(loaded.turn)
            session = loaded.beside if loaded.beside and self._running else loaded.alone
            self._running += 1
            stack.callback(self._ended)
            run = asyncio.get_running_loop().run_in_executor
            return Inference(await run(self._pool, loaded.answer, session, crops), loaded.model)

    def _ended(self) -> None:
        self._running -= 1

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher
        self._pool.shutdown(wait=True)
        self._loaded = None

    def _ready(self) -> _Loaded:
        if self._loaded is None:
            raise ModelNotReady(f"the model {self._name} is not loaded yet; try again in a moment")
        return self._loaded


@dataclass(frozen=True)
class _Loaded:
    """One version, opened with every thread, and, where it is small, with one thread as well."""

    alone: onnxruntime.InferenceSession
    beside: onnxruntime.InferenceSession | None
    model: Model
    takes_squares: bool
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def answer(self, session: onnxruntime.InferenceSession, images: Pixels) -> Probabilities:
        """Of one of its sessions, for crops or a square."""
        if is_square(images) and not self.takes_squares:
            images = cut_crops(images[0], Crops.TEN)
        return run_session(session, images)


def load(version: Version, threads: int) -> _Loaded:
    """Open a version and ask it what it answered when it was exported; raises ModelNotReady."""
    alone = open_session(version, threads)
    check_golden(version, alone)
    beside = alone if threads == 1 else None
    if threads > 1 and version.path.stat().st_size <= BESIDE_MAX_BYTES:
        beside = open_session(version, 1)
    info = ModelInfo(version.model, version.number, version.precision, "onnxruntime")
    model = Model(info, version.labels, version.provenance)
    return _Loaded(alone, beside, model, takes_squares=version.square is not None)


def open_session(version: Version, threads: int) -> onnxruntime.InferenceSession:
    """Open and warm up a version; raises ModelNotReady naming the file and the command that makes it.

    Threads spin between operators (measured: 75 against 103 ms for ten crops), but not between
    inferences, where the decoders of other requests need the cores.
    """
    if version.path.suffix == PLAN_SUFFIX:
        raise ModelNotReady(
            f"{version.path}: a TensorRT engine, which Triton serves: alexnet serve --triton HOST:PORT "
            f"--model {version.model}"
        )
    _share_memory()
    path = version.square or version.path
    shapes = {(count, CROP_SIZE, CROP_SIZE, CHANNELS) for count in CROP_COUNT.values()}
    if version.square:
        shapes.add((1, RESIZE_SIZE, RESIZE_SIZE, CHANNELS))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        widths = {run_session(session, np.zeros(shape, np.uint8)).shape[1] for shape in shapes}
    except Exception as error:  # ONNX Runtime raises classes of its own for each kind of damage
        reason = str(error).splitlines()[0]
        raise ModelNotReady(f"{path}: cannot be loaded ({reason}); {EXPORT_HINT}") from error
    if widths != {len(version.labels)}:
        raise ModelNotReady(
            f"{version.path}: {max(widths)} outputs, but labels.txt has {len(version.labels)} lines; "
            f"{EXPORT_HINT}"
        )
    return session


@cache
def _share_memory() -> None:
    """One arena for all sessions of the process: 100 MB less than one each (full width, two sessions)."""
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(0, -1, -1, -1))


def check_golden(version: Version, session: onnxruntime.InferenceSession) -> None:
    """Raises ModelNotReady where the version does not answer its golden images as it was exported."""
    if version.golden is None:
        return
    try:
        broken = version.golden.broken(version.golden.differences(partial(run_session, session)))
    except ServingError as error:
        broken = str(error)
    if broken is not None:
        raise ModelNotReady(
            f"{version.path}: does not answer as when it was exported ({broken}); {EXPORT_HINT}"
        )


def run_session(session: onnxruntime.InferenceSession, crops: Pixels) -> Probabilities:
    """One inference in the calling thread: uint8 [N, 224, 224, 3] -> float32 [N, classes], or of a square."""
    probabilities: Probabilities = session.run([OUTPUT_NAME], {INPUT_NAME: crops})[0]
    return probabilities
