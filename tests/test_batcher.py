"""Waiting inferences are joined where that is cheaper, and each request gets its own rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FakeBackend

from serving.backends import Inference
from serving.batcher import Batcher
from serving.contract import CHANNELS, CROP_SIZE, RESIZE_SIZE
from serving.errors import EngineFailed
from serving.postprocess import Probabilities
from serving.preprocess import Pixels


class Gated(FakeBackend):
    """Each inference waits for its turn to be let through; its rows are the crops' first pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Semaphore(0)
        self.fault: Exception | None = None
        self.given_up: list[int] = []

    async def infer(self, crops: Pixels, deadline_s: float | None = None) -> Inference:
        self.batches.append(crops)
        self.deadlines.append(deadline_s)
        try:
            await self.gate.acquire()
        except asyncio.CancelledError:
            self.given_up.append(len(crops))
            raise
        if self.fault is not None:
            raise self.fault
        return Inference(first_pixels(crops), self._model)


def first_pixels(crops: Pixels) -> Probabilities:
    return crops[:, 0, 0, :].astype(np.float32)


def crops_of(count: int, seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, CROP_SIZE, CROP_SIZE, CHANNELS), np.uint8)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=12), st.integers(1, 3), st.integers(0, 12))
def test_each_request_gets_its_rows_whatever_it_was_joined_with(
    sizes: list[int], places: int, max_crops: int
) -> None:
    async def test() -> None:
        engine, batcher = Gated(), Batcher(places, max_crops)
        asked = [crops_of(size, seed) for seed, size in enumerate(sizes)]
        tasks = [asyncio.create_task(batcher.infer(engine, crops)) for crops in asked]
        await settle()
        assert len(engine.batches) == min(places, len(engine.batches))
        for _ in sizes:
            engine.gate.release()
        for crops, share in zip(asked, await asyncio.gather(*tasks), strict=True):
            np.testing.assert_array_equal(share.inference.probabilities, first_pixels(crops))
            assert share.waited_s >= 0 and 0 < share.cost_s <= share.ran_s
        joined = [len(batch) for batch in engine.batches]
        assert sum(joined) == sum(sizes)
        assert all(count <= max(max_crops, *sizes) for count in joined)

    run(test)


def test_small_requests_that_wait_go_together_and_in_order_with_the_large() -> None:
    async def test() -> None:
        engine, batcher = Gated(), Batcher(places=1, max_crops=10)
        sizes = [1, 1, 2, 10, 1, 5, 1]
        tasks = [asyncio.create_task(batcher.infer(engine, crops_of(size, size))) for size in sizes]
        for _ in range(4):
            await settle()
            engine.gate.release()
        await asyncio.gather(*tasks)
        assert [len(batch) for batch in engine.batches] == [1, 10, 10]

    run(test)


def test_a_square_is_never_joined_and_counts_as_its_ten_crops() -> None:
    async def test() -> None:
        engine, batcher = FakeBackend(), Batcher(places=1, max_crops=30)
        rng = np.random.default_rng(4)
        square = rng.integers(0, 256, (1, RESIZE_SIZE, RESIZE_SIZE, CHANNELS), np.uint8)
        images = [crops_of(2, 1), square, crops_of(3, 2), square[:, ::-1], crops_of(1, 3)]
        shares = await asyncio.gather(*(batcher.infer(engine, each) for each in images))
        for each, share in zip(images, shares, strict=True):
            np.testing.assert_array_equal(share.inference.probabilities, engine.probabilities(each))
            assert share.cost_s <= share.ran_s
        assert [batch.shape[:2] for batch in engine.batches] == [(2, 224), (1, 256), (4, 224), (1, 256)]

    run(test)


def test_models_are_not_mixed_and_a_server_that_batches_itself_gets_each_request_alone() -> None:
    async def test() -> None:
        one, other, batcher = Gated(), Gated(), Batcher(places=1, max_crops=10)
        backends = [one, other, one, other, one]
        tasks = [asyncio.create_task(batcher.infer(backend, crops_of(2, 7))) for backend in backends]
        for engine in (one, other):
            for _ in range(3):
                engine.gate.release()
        await asyncio.gather(*tasks)
        assert [len(batch) for batch in one.batches] == [2, 4] and [len(b) for b in other.batches] == [4]

        alone, batcher = Gated(), Batcher(places=2, max_crops=0)
        tasks = [asyncio.create_task(batcher.infer(alone, crops_of(1, 7))) for _ in range(4)]
        for _ in tasks:
            alone.gate.release()
        await asyncio.gather(*tasks)
        assert [len(batch) for batch in alone.batches] == [1, 1, 1, 1]

    run(test)


def test_who_leaves_takes_its_place_in_the_queue_along_and_an_inference_only_with_the_last() -> None:
    async def test() -> None:
        engine, batcher = Gated(), Batcher(places=1, max_crops=10)
        tasks = [asyncio.create_task(batcher.infer(engine, crops_of(1, seed))) for seed in range(5)]
        await settle()
        tasks[4].cancel()  # waits
        await settle()
        engine.gate.release()  # the first; the next three together
        await settle()
        assert [len(batch) for batch in engine.batches] == [1, 3]
        tasks[1].cancel()
        tasks[2].cancel()
        await settle()
        assert not engine.given_up
        tasks[3].cancel()
        await settle()
        assert engine.given_up == [3]
        after = asyncio.create_task(batcher.infer(engine, crops_of(1, 9)))
        engine.gate.release()
        np.testing.assert_array_equal(
            (await after).inference.probabilities, first_pixels(crops_of(1, 9))
        )

    run(test)


def test_a_failure_is_told_to_all_and_the_place_is_free_again() -> None:
    async def test() -> None:
        engine, batcher = Gated(), Batcher(places=1, max_crops=10)
        engine.fault = EngineFailed("broken")
        tasks = [asyncio.create_task(batcher.infer(engine, crops_of(1, seed))) for seed in range(3)]
        for _ in range(2):
            engine.gate.release()
        for task in tasks:
            with pytest.raises(EngineFailed, match="broken"):
                await task
        engine.fault = None
        engine.gate.release()
        await batcher.infer(engine, crops_of(1, 3))

    run(test)


def test_joined_requests_are_given_the_time_of_the_most_patient() -> None:
    async def test() -> None:
        engine, batcher = Gated(), Batcher(places=1, max_crops=10)
        times = [None, 5.0, 9.0, 7.0]
        tasks = [asyncio.create_task(batcher.infer(engine, crops_of(1, 0), time)) for time in times]
        for _ in times:
            engine.gate.release()
        await asyncio.gather(*tasks)
        assert engine.deadlines == [None, 9.0]

    run(test)
