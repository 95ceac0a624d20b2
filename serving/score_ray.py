"""The same stages on a Ray cluster: Ray Data spreads decoding over its nodes, a Triton fleet answers.

    listing and journal here -> Decode actors -> Infer actors -> rows, in order -> journal here

The groups are those of a run in one process, so the table is the same, and a run begun on one
machine may go on here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import ray
import ray.data

from serving.backends import Backend, Model
from serving.contract import CHANNELS, RESIZE_SIZE
from serving.decoder import Failure
from serving.decoders import Decoders
from serving.errors import ModelNotReady
from serving.loop_thread import LoopThread
from serving.score import Job, Pace, Told, answer, take
from serving.sources import Item
from serving.tables import Row

_CONNECT_S: Final = 5
_MAX_BLOCKS: Final = 1000
_SQUARE: Final = (RESIZE_SIZE, RESIZE_SIZE, CHANNELS)


def connect(address: str) -> int:
    """Join the cluster at HOST:PORT, or `local`; returns its CPUs. Raises ModelNotReady.

    This package travels to the nodes; what it needs (pip install '.[ray]') must be there.
    """
    _check_reachable(address)
    try:
        ray.init(
            address=address,
            runtime_env={"py_modules": [str(Path(__file__).parent)]},
            log_to_driver=False,
            logging_level=logging.WARNING,
            configure_logging=False,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ModelNotReady(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(resources["CPU"])


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    if address == "local":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise ModelNotReady(f"no Ray cluster at {address}: {error}; it is HOST:PORT, or local") from error


@dataclass(frozen=True)
class RayStages:
    """`pace.in_flight` batches are under way, at most `cpus` - 1 processes decode."""

    job: Job
    model: Model
    make_backend: Callable[[], Backend]
    pace: Pace
    cpus: int

    async def groups(self, items: Iterator[Item]) -> AsyncIterator[list[Row]]:
        """In order. Ray moves squares, never crops: a fifth of the bytes."""
        listed = iter(lambda: take(items, self.job.group), [])
        groups = [{"items": json.dumps([vars(item) for item in group])} for group in listed]
        if not groups:
            return
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        stages = (
            ray.data.from_items(groups, override_num_blocks=min(len(groups), _MAX_BLOCKS))
            .map(
                Decode,  # type: ignore[arg-type]  # a class of callable objects is documented, and not typed
                concurrency=(1, max(1, self.cpus - 1)),
                num_cpus=1,
            )
            .map(
                Infer,  # type: ignore[arg-type]
                fn_constructor_args=(self.job, self.model, self.make_backend, self.pace),
                concurrency=self.pace.in_flight,
                num_cpus=0,
            )
        )
        rows = iter(stages.iter_rows())
        while (row := await asyncio.to_thread(next, rows, None)) is not None:
            yield json.loads(row["rows"])


class Decode:
    """An actor with one decoding process, replaced when a picture breaks it."""

    def __init__(self) -> None:
        self._decoders = Decoders(1)

    def __call__(self, group: dict[str, Any]) -> dict[str, Any]:
        decoded = [self._decoders.decode(Item(**item)) for item in json.loads(group["items"])]
        failures = {i: vars(each) for i, each in enumerate(decoded) if isinstance(each, Failure)}
        squares = [each for each in decoded if not isinstance(each, Failure)]
        return group | {
            "squares": np.stack(squares) if squares else np.zeros((0, *_SQUARE), np.uint8),
            "failures": json.dumps(failures),
        }


class Infer:
    """An actor with a connection to the Triton fleet, its event loop in a thread of its own."""

    def __init__(self, job: Job, model: Model, make_backend: Callable[[], Backend], pace: Pace) -> None:
        self._job, self._model, self._pace = job, model, pace
        self._backend = make_backend()
        self._loop = LoopThread()
        self._loop.wait(self._backend.start())

    def __call__(self, group: dict[str, Any]) -> dict[str, Any]:
        items = [Item(**item) for item in json.loads(group["items"])]
        failures = {int(i): Failure(**each) for i, each in json.loads(group["failures"]).items()}
        squares = iter(group["squares"])
        decoded = [failures[i] if i in failures else next(squares) for i in range(len(items))]
        rows = answer(self._job, self._model, self._backend, self._pace, Told(), items, decoded)
        return {"rows": json.dumps(self._loop.wait(rows))}
