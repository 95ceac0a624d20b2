"""Batch scoring: files -> decoded in processes -> crops -> an engine -> one row a file, whatever happens.

    items --(workers)--> squares --(whole batches)--> probabilities --> journal --> table

Killed at any moment and started again, it goes on where the journal ends, and the table is what it
would have been: rows stand in the source's order, and no row depends on what ran beside it. For
that, files are grouped by their place in the source, and each group is one full batch, filled up
with black crops: a server that joins requests finds no room to join another's, and a network's
last bits depend on the size of the batch.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from serving.backends import Backend, Model
from serving.contract import CHANNELS, CROP_COUNT, CROP_SIZE, MAX_BATCH, Crops
from serving.decoder import Failure
from serving.decoders import Decoders
from serving.errors import (
    DeadlineExceeded,
    EngineFailed,
    MalformedRequest,
    ModelNotReady,
    Overloaded,
    ServerError,
)
from serving.journal import Journal
from serving.postprocess import Probabilities, average, top_predictions
from serving.preprocess import Pixels, cut_crops
from serving.sources import Item, list_items
from serving.tables import COLUMNS, Row, kind_of, write_table

INFER_TIMEOUT_S: Final = 120.0
ENGINE_TRIES: Final = 3
"""For an answer that is an error of the engine's own; what merely is not there is waited for."""

_PAUSE_S: Final = 0.5


@dataclass(frozen=True)
class Job:
    """What decides the rows: a journal goes on only with the same."""

    source: str
    crops: Crops = Crops.TEN
    top: int = 5

    def __post_init__(self) -> None:
        if self.crops is Crops.AUTO:
            raise MalformedRequest("crops: center or ten; auto is for answers that somebody waits for")
        if self.top < 1:
            raise MalformedRequest(f"top: at least 1, not {self.top}")

    @property
    def group(self) -> int:
        """Files whose crops fill a batch."""
        return MAX_BATCH // CROP_COUNT[self.crops]


@dataclass(frozen=True)
class Pace:
    """What decides the speed only."""

    workers: int
    in_flight: int = 2
    """Groups decoded, sent or waited for at a time: memory is bounded by them."""
    wait_s: float = 300.0
    """How long a server that is away is waited for."""


@dataclass
class Summary:
    """A run's table, counted."""

    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)

    def count(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.rows += 1
            if row["reason"] is None:
                self.labels[row["label"]] += 1
            else:
                self.reasons[row["reason"]] += 1


@dataclass(frozen=True)
class Told:
    """How a run is followed: files done of all, and what it waits for (None: nothing)."""

    progress: Callable[[int, int], None] = lambda _done, _total: None
    waiting: Callable[[str | None], None] = lambda _: None


async def score(
    job: Job,
    out: Path,
    backend: Backend,
    pace: Pace,
    *,
    force: bool = False,
    restart: bool = False,
    told: Told | None = None,
    stages: Callable[[Model], Stages] | None = None,
) -> Summary:
    """Write the table; returns its counts. Raises a ServingError, and then the journal is kept.

    `stages`: default here, in this process. `force`: replace a table that is there. `restart`: forget
    a run that was begun.
    """
    told = told or Told()
    kind_of(out)
    journal = Journal(out)
    if restart:
        journal.discard()
    _check_place(out, replace=force or journal.job is not None)
    try:
        async with _started(backend, pace.wait_s, told) as model:
            identity = {"model": model.info.name, "version": model.info.version}
            journal.begin(asdict(job) | identity, list_items(job.source))
            told.progress(journal.scored, journal.total)
            where = stages(model) if stages else LocalStages(job, model, backend, pace, told)
            async for rows in where.groups(journal.items()):
                journal.append(rows)
                told.progress(journal.scored, journal.total)
        summary = Summary()
        write_table(out, _counted(journal.rows(), summary))
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename or out})"
        raise MalformedRequest(f"{reason}; what is done stays in {journal.folder}") from error
    finally:
        journal.close()
    journal.remove()
    return summary


def _check_place(out: Path, *, replace: bool) -> None:
    if out.exists() and not replace:
        raise MalformedRequest(f"{out} is there already; --force replaces it")
    if not out.parent.is_dir():
        raise MalformedRequest(f"{out.parent}: no such folder for the table")


class Stages(Protocol):
    """Where the work is done: in this process and its workers, or on a cluster."""

    def groups(self, items: Iterator[Item]) -> AsyncIterator[list[Row]]:
        """The rows of each group of items, in order."""


class LocalStages:
    """Decoding in processes here; a few groups are under way at a time."""

    def __init__(self, job: Job, model: Model, backend: Backend, pace: Pace, told: Told) -> None:
        self._job, self._model, self._backend = job, model, backend
        self._pace, self._told = pace, told

    async def groups(self, items: Iterator[Item]) -> AsyncIterator[list[Row]]:
        decoders = Decoders(self._pace.workers)
        threads = ThreadPoolExecutor(self._pace.workers, thread_name_prefix="decode")
        ahead: deque[asyncio.Task[list[Row]]] = deque()
        try:
            while True:
                while len(ahead) < self._pace.in_flight and (group := take(items, self._job.group)):
                    ahead.append(asyncio.create_task(self._group(group, decoders, threads)))
                if not ahead:
                    return
                yield await ahead.popleft()
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)
            threads.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(decoders.close)

    async def _group(
        self, items: list[Item], decoders: Decoders, threads: ThreadPoolExecutor
    ) -> list[Row]:
        run = asyncio.get_running_loop().run_in_executor
        decoded = await asyncio.gather(*(run(threads, decoders.decode, item) for item in items))
        return await answer(self._job, self._model, self._backend, self._pace, self._told, items, decoded)


async def answer(
    job: Job,
    model: Model,
    backend: Backend,
    pace: Pace,
    told: Told,
    items: list[Item],
    decoded: list[Pixels | Failure],
) -> list[Row]:
    """A group's rows, from what decoding made of each of its items."""
    squares = [square for square in decoded if not isinstance(square, Failure)]
    means: Iterator[Probabilities] = iter(())
    if squares:
        probabilities = await _infer(full_batch(job, squares), model, backend, pace, told)
        each = CROP_COUNT[job.crops]
        means = (average(probabilities[i * each : (i + 1) * each]) for i in range(len(squares)))
    return [
        _failed_row(job, model, item, square)
        if isinstance(square, Failure)
        else _row(job, model, item, next(means))
        for item, square in zip(items, decoded, strict=True)
    ]


def full_batch(job: Job, squares: list[Pixels]) -> Pixels:
    """Squares uint8 [256, 256, 3] -> the crops of each and black ones after, uint8 [80, 224, 224, 3]."""
    each = CROP_COUNT[job.crops]
    batch = np.zeros((job.group * each, CROP_SIZE, CROP_SIZE, CHANNELS), np.uint8)
    for place, square in enumerate(squares):
        batch[place * each : (place + 1) * each] = cut_crops(square, job.crops)
    return batch


async def _infer(batch: Pixels, model: Model, backend: Backend, pace: Pace, told: Told) -> Probabilities:
    clock = asyncio.get_running_loop().time
    give_up_s = clock() + pace.wait_s
    failures = 0
    while True:
        try:
            inference = await backend.infer(batch, clock() + INFER_TIMEOUT_S)
        except (ModelNotReady, Overloaded, DeadlineExceeded, EngineFailed) as error:
            failures += isinstance(error, EngineFailed)
            if clock() > give_up_s or failures >= ENGINE_TRIES:
                raise
            told.waiting(str(error))
        else:
            told.waiting(None)
            _check_version(inference.model, model)
            return inference.probabilities
        await asyncio.sleep(_PAUSE_S)


def _check_version(answered: Model, wanted: Model) -> None:
    if answered.info.version != wanted.info.version:
        raise ModelNotReady(
            f"version {answered.info.version} answers where version {wanted.info.version} did when this was "
            "begun; serve that one again and repeat the command, or begin anew with --restart"
        )


def _row(job: Job, model: Model, item: Item, mean: Probabilities) -> Row:
    top = top_predictions(mean, model.labels, job.top)
    return _cells(
        job,
        model,
        item,
        index=top[0].index,
        wnid=top[0].wnid,
        label=top[0].label,
        probability=top[0].probability,
        top_labels=[each.label for each in top],
        top_probabilities=[each.probability for each in top],
    )


def _failed_row(job: Job, model: Model, item: Item, failure: Failure) -> Row:
    return _cells(job, model, item, reason=failure.reason, detail=failure.detail)


def _cells(job: Job, model: Model, item: Item, **cells: Any) -> Row:
    row: Row = dict.fromkeys(COLUMNS)
    asked = {"path": item.name, "crops": CROP_COUNT[job.crops]}
    return row | asked | {"model": model.info.name, "version": model.info.version} | cells


@asynccontextmanager
async def _started(backend: Backend, wait_s: float, told: Told) -> AsyncIterator[Model]:
    """The backend and its model, waited for."""
    await backend.start()
    try:
        yield await _model(backend, wait_s, told)
    finally:
        await backend.close()


async def _model(backend: Backend, wait_s: float, told: Told) -> Model:
    clock = asyncio.get_running_loop().time
    until_s = clock() + wait_s
    while True:
        try:
            model = backend.model
        except ServerError as error:
            if clock() > until_s:
                raise
            told.waiting(str(error))
        else:
            told.waiting(None)
            return model
        await asyncio.sleep(_PAUSE_S)


def _counted(groups: Iterator[list[Row]], summary: Summary) -> Iterator[list[Row]]:
    for rows in groups:
        summary.count(rows)
        yield rows


def take(items: Iterator[Item], count: int) -> list[Item]:
    return list(islice(items, count))
