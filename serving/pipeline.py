"""The way of one photograph: admit, wait for a slot, decode and cut, infer, average, decide."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np

from serving.admission import Admission, Limits, Work
from serving.backends import Backend, Inference, ModelInfo
from serving.batcher import Batcher
from serving.brownout import Brownout
from serving.contract import CENTRE, CENTRE_MIRRORED, CROP_COUNT, VIEWS, Crops
from serving.costs import LEVELS
from serving.decoder import Failure, Upload
from serving.decoders import Decoders
from serving.errors import DecoderCrashed, DecodeTimeout
from serving.postprocess import (
    Label,
    Prediction,
    Probabilities,
    average,
    margin,
    predict,
    top_predictions,
)
from serving.preprocess import Pixels, count_views, cut_views, views_of
from serving.trail import passed

DEFAULT_AUTO_MARGIN: Final = 0.5
"""For a model that does not say at which margin between its first two labels two crops are enough."""

Views = tuple[int, ...]
"""Indices into `contract.VIEWS`."""

FIRST_VIEWS: Final[Views] = (CENTRE, CENTRE_MIRRORED)
"""What is looked at before the other eight, and all that is where there is no time for them."""

logger = logging.getLogger("alexnet.gateway")


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


@dataclass(frozen=True)
class Asker:
    """Who asks, and how much of an answer: admission's side of a request.

    `client`: whoever shares fairly with others, a key's name or an address. `deadline_s`: when the caller
    gives up, on the event loop's clock.
    """

    client: str = ""
    may_degrade: bool = True
    deadline_s: float | None = None


class Pipeline:
    """Composes the stages over a backend. One per event loop; `close` ends its decoders."""

    def __init__(
        self,
        backend: Backend,
        decoders: Decoders,
        *,
        max_waiting_crops: int = Limits.max_waiting_crops,
        max_wait_s: float = Limits.max_wait_s,
        auto_margin: float | None = None,
        brownout: Brownout | None = None,
    ) -> None:
        limits = Limits(backend.concurrency, decoders.workers, max_waiting_crops, max_wait_s)
        self.backend = backend
        self.admission = Admission(limits, brownout)
        self._auto_margin = auto_margin
        self._decoders = decoders
        self._threads = ThreadPoolExecutor(decoders.workers, "decode")  # each waits for a decoder
        self._engine = Batcher(backend.concurrency, backend.batch_crops)

    @property
    def inferences(self) -> int:
        """Begun so far; fewer than answers where small ones were joined."""
        return self._engine.inferences

    def check(self, crops: Crops, backend: Backend, asker: Asker) -> None:
        """Raise Overloaded or ModelNotReady where a request would be refused, before its body is read."""
        left_s = math.inf
        if asker.deadline_s is not None:
            left_s = asker.deadline_s - asyncio.get_running_loop().time()
        self.admission.check(_work(crops, backend, asker), left_s)

    async def classify(
        self,
        data: bytes,
        crops: Crops,
        top: int = 5,
        backend: Backend | None = None,
        *,
        detail: bool = False,
        asker: Asker = Asker(),
    ) -> Answer:
        """Answer one encoded photograph; raises a leaf of `serving.errors.ServingError`.

        `backend`: the model's, where it is not the one that the pipeline was made with; they share the
        engine's places.
        """
        backend = backend or self.backend
        work = _work(crops, backend, asker)
        timing = {"decode": 0.0, "queue": 0.0, "infer": 0.0}  # it waits twice, before decoding and after
        with _timed(timing, "queue") as waited:
            async with self.admission.slot(work, asker.deadline_s) as level:
                waited()
                seen, inference = await self._through(backend, data, work, level, asker.deadline_s, timing)
        with _timed(timing, "post"):
            mean = average(inference.probabilities)
            predictions = top_predictions(mean, inference.model.labels, top)
            views = _said(seen, inference, predictions[0].index, top) if detail else []
        degraded = level > 0 and self._fewer(crops, seen, inference)
        return Answer(predictions, inference.model.info, len(seen), timing, views, degraded)

    async def _through(
        self,
        backend: Backend,
        data: bytes,
        work: Work,
        level: int,
        deadline_s: float | None,
        timing: dict[str, float],
    ) -> tuple[Views, Inference]:
        """Decode, cut, wait for a place, infer: which views were seen, and what was said of each."""
        views = _views_at(work.crops, level)
        with _timed(timing, "decode"):
            run = asyncio.get_running_loop().run_in_executor
            square, images = await run(self._threads, self._prepare, data, views, backend.takes_squares)
        infer = partial(self._infer, backend, work, deadline_s, timing)
        inference = await infer(images)
        if work.crops is Crops.AUTO and not level and not self._settled(inference):
            return await _complete(infer, square, inference, backend.takes_squares)
        return views, inference

    async def _infer(
        self, backend: Backend, work: Work, deadline_s: float | None, timing: dict[str, float], images: Pixels
    ) -> Inference:
        share = await self._engine.infer(backend, images, deadline_s)
        ended_s = time.perf_counter()
        began_s = ended_s - share.ran_s
        passed("queue", began_s - share.waited_s, began_s)
        passed("infer", began_s, ended_s)
        timing["queue"] += 1000 * share.waited_s
        timing["infer"] += 1000 * share.ran_s
        self.admission.measured(work.model, count_views(images), share.cost_s)
        return share.inference

    def _prepare(self, data: bytes, views: Views, as_square: bool) -> tuple[Pixels, Pixels]:
        square = self._decoders.decode(Upload(data))
        if not isinstance(square, Failure):
            return square, _images(square, views, as_square)
        if isinstance(square.error, DecoderCrashed | DecodeTimeout):
            logger.warning("an upload cost its decoder, which is replaced: %s", square.detail)
        raise square.error

    def _settled(self, inference: Inference) -> bool:
        """Whether the centre and its mirror image leave no doubt that the other eight could change."""
        least = self._auto_margin
        if least is None:
            least = inference.model.provenance.get("auto", {}).get("margin", DEFAULT_AUTO_MARGIN)
        return margin(average(inference.probabilities)) >= least

    def _fewer(self, crops: Crops, seen: Views, inference: Inference) -> bool:
        """Whether full service would have looked at more."""
        if crops is Crops.AUTO and seen == FIRST_VIEWS:
            return not self._settled(inference)
        return len(seen) < CROP_COUNT[crops]

    def close(self) -> None:
        """End the decoders; nobody waits for what they are doing."""
        self._decoders.close()
        self._threads.shutdown(wait=True, cancel_futures=True)


def _work(crops: Crops, backend: Backend, asker: Asker) -> Work:
    """A model that is not ready is told here, before anything is done."""
    return Work(asker.client, backend.model.info.name, crops, asker.may_degrade)


def _views_at(crops: Crops, level: int) -> Views:
    """What is looked at first at a level of service; views in the contract's order."""
    asked = FIRST_VIEWS if crops is Crops.AUTO else views_of(crops)
    return asked if len(asked) <= LEVELS[level] else FIRST_VIEWS[: LEVELS[level]]


def _images(square: Pixels, views: Views, as_square: bool) -> Pixels:
    """What the engine is given for these views of a square."""
    return square[None] if as_square and len(views) == len(VIEWS) else cut_views(square, views)


async def _complete(
    infer: Callable[[Pixels], Awaitable[Inference]], square: Pixels, first: Inference, as_square: bool
) -> tuple[Views, Inference]:
    """The other eight views beside the first two.

    All ten again where a square stands for them, which takes no longer than eight crops, and where the
    version changed in between.
    """
    every = views_of(Crops.TEN)
    if as_square:
        return every, await infer(_images(square, every, as_square))
    rest = tuple(view for view in every if view not in FIRST_VIEWS)
    others = await infer(cut_views(square, rest))
    if others.model != first.model:  # no mean over two networks
        return every, await infer(cut_views(square, every))
    rows = np.empty((len(every), first.probabilities.shape[1]), np.float32)
    rows[list(FIRST_VIEWS)], rows[list(rest)] = first.probabilities, others.probabilities
    return every, Inference(rows, first.model)


def _said(seen: Views, inference: Inference, winner: int, top: int) -> list[View]:
    """What each crop said on its own, the mean's first label always among it."""
    labels = inference.model.labels
    return [
        _view(view, row, winner, labels, top)
        for view, row in zip(seen, inference.probabilities, strict=True)
    ]


def _view(view: int, row: Probabilities, winner: int, labels: tuple[Label, ...], top: int) -> View:
    predictions = top_predictions(row, labels, top)
    if all(prediction.index != winner for prediction in predictions):
        predictions.append(predict(row, labels, winner))
    position, mirrored = VIEWS[view]
    return View(position, mirrored, predictions)


@contextmanager
def _timed(timing: dict[str, float], stage: str) -> Iterator[Callable[[], None]]:
    """Add the block's milliseconds to a stage, or those until what is yielded is called."""
    started, done = time.perf_counter(), False

    def stop() -> None:
        nonlocal done
        if not done:
            ended = time.perf_counter()
            timing[stage] = timing.get(stage, 0.0) + 1000 * (ended - started)
            passed(stage, started, ended)
        done = True

    try:
        yield stop
    finally:
        stop()
