"""The way of one photograph: admit, decode and cut, queue, infer, average, decide."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from serving.admission import Admission
from serving.backends import Backend, Inference, ModelInfo
from serving.contract import CENTRE, CENTRE_MIRRORED, CROP_COUNT, VIEWS, Crops
from serving.postprocess import (
    Label,
    Prediction,
    Probabilities,
    average,
    margin,
    predict,
    top_predictions,
)
from serving.preprocess import Pixels, prepare


@dataclass(frozen=True)
class View:
    """What one crop said on its own: its top labels, and the mean's first label among them."""

    position: str
    mirrored: bool
    predictions: list[Prediction]


@dataclass(frozen=True)
class Answer:
    """Top labels of one photograph; `timing_ms` holds milliseconds by stage."""

    predictions: list[Prediction]
    model: ModelInfo
    crops: int
    timing_ms: dict[str, float]
    views: list[View] = field(default_factory=list)
    degraded: bool = False


class Pipeline:
    """Composes the stages over a backend. One per event loop; `close` ends its decode threads."""

    def __init__(
        self,
        backend: Backend,
        *,
        decode_threads: int,
        max_pixels: int,
        max_waiting_crops: int,
        auto_margin: float,
    ) -> None:
        self.backend = backend
        self.admission = Admission(max_waiting_crops, backend.concurrency)
        self._max_pixels, self._auto_margin = max_pixels, auto_margin
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._engine = asyncio.Semaphore(backend.concurrency)

    async def classify(
        self,
        data: bytes,
        crops: Crops,
        top: int = 5,
        backend: Backend | None = None,
        *,
        detail: bool = False,
        deadline_s: float | None = None,
    ) -> Answer:
        """Answer one encoded photograph; raises a leaf of `serving.errors.ServingError`.

        `backend`: the model's, where it is not the one that the pipeline was made with; they share the
        engine's places. `deadline_s`: when the caller gives up, on the event loop's clock.
        """
        backend = backend or self.backend
        timing: dict[str, float] = {}
        _ = backend.model  # not ready: told before the work of decoding
        with self.admission.admit(CROP_COUNT[crops]):
            with _timed(timing, "decode"):
                run = asyncio.get_running_loop().run_in_executor
                cut = await run(self._decoders, prepare, data, crops, self._max_pixels)
            with _timed(timing, "queue"):
                await self._engine.acquire()
            try:
                with _timed(timing, "infer"):
                    seen, inference = await self._infer(backend, cut, crops, deadline_s)
            finally:
                self._engine.release()
            self.admission.measured(len(seen), timing["infer"] / 1000)
        model = inference.model
        with _timed(timing, "post"):
            mean = average(inference.probabilities)
            predictions = top_predictions(mean, model.labels, top)
            winner = predictions[0].index
            views = [
                _view(view, row, winner, model.labels, top)
                for view, row in zip(seen, inference.probabilities, strict=True)
                if detail
            ]
        return Answer(predictions, model.info, len(seen), timing, views)

    async def _infer(
        self, backend: Backend, cut: Pixels, crops: Crops, deadline_s: float | None
    ) -> tuple[list[int], Inference]:
        """Which of the ten views were seen, and what one model version said of each."""
        all_views = list(range(len(cut)))
        if crops is Crops.CENTER:
            return [CENTRE], await backend.infer(cut, deadline_s)
        if crops is Crops.TEN:
            return all_views, await backend.infer(cut, deadline_s)
        first = [CENTRE, CENTRE_MIRRORED]
        settled = await backend.infer(cut[first], deadline_s)
        if margin(average(settled.probabilities)) >= self._auto_margin:
            return first, settled
        rest = [view for view in all_views if view not in first]
        others = await backend.infer(cut[rest], deadline_s)
        if others.model != settled.model:  # a reload in between: no mean over two networks
            return all_views, await backend.infer(cut, deadline_s)
        every = np.empty((len(cut), settled.probabilities.shape[1]), np.float32)
        every[first], every[rest] = settled.probabilities, others.probabilities
        return all_views, Inference(every, settled.model)

    def close(self) -> None:
        """End the decode threads; what they are doing is finished first."""
        self._decoders.shutdown(wait=True)


def _view(view: int, row: Probabilities, winner: int, labels: tuple[Label, ...], top: int) -> View:
    predictions = top_predictions(row, labels, top)
    if all(prediction.index != winner for prediction in predictions):
        predictions.append(predict(row, labels, winner))
    position, mirrored = VIEWS[view]
    return View(position, mirrored, predictions)


@contextmanager
def _timed(timing: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        timing[stage] = 1000 * (time.perf_counter() - started)
