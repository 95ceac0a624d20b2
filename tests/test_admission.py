"""Admission: a bounded amount waits, whoever asks little is not starved, the retry time is truthful."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.admission import Admission, Limits, Work
from serving.brownout import Brownout
from serving.contract import Crops
from serving.errors import DeadlineExceeded, Overloaded


@dataclass
class Bench:
    """An admission whose work ends when the test says so; who got a slot is noted, with the level."""

    admission: Admission
    slots: list[tuple[str, int]] = field(default_factory=list)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    ends: dict[str, asyncio.Event] = field(default_factory=dict)

    async def ask(
        self,
        name: str,
        client: str = "",
        crops: Crops = Crops.TEN,
        *,
        may_degrade: bool = True,
        deadline_s: float | None = None,
    ) -> None:
        """Begin to ask, as far as it goes."""
        work = Work(client or name, "alexnet", crops, may_degrade)
        self.ends[name] = asyncio.Event()

        async def run() -> None:
            async with self.admission.slot(work, deadline_s) as level:
                self.slots.append((name, level))
                await self.ends[name].wait()

        self.tasks[name] = asyncio.create_task(run())
        await settle()

    async def end(self, *names: str) -> None:
        for name in names:
            self.ends[name].set()
            await self.tasks[name]
        await settle()

    async def end_all(self) -> None:
        for end in self.ends.values():
            end.set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def bench(**limits: Any) -> Bench:
    """One place and nothing ahead, so that everything is in order."""
    brownout = limits.pop("brownout", None)
    return Bench(Admission(Limits(**{"places": 1, "ahead": 0} | limits), brownout))


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


def slow(admission: Admission, ms_per_crop: float) -> None:
    for crops in (1, 2, 10):
        for _ in range(9):
            admission.measured("alexnet", crops, crops * ms_per_crop / 1000)


@given(st.lists(st.sampled_from(list(Crops)), max_size=40), st.integers(1, 4), st.integers(10, 100))
def test_no_more_than_the_limit_is_admitted_and_everything_is_given_back(
    asked: list[Crops], places: int, limit: int
) -> None:
    async def test() -> None:
        it = bench(places=places, max_waiting_crops=limit, max_wait_s=1e9)
        for index, crops in enumerate(asked):
            await it.ask(str(index), "one", crops)
            assert it.admission.waiting_crops <= limit
        await it.end_all()
        refused = sum(isinstance(task.exception(), Overloaded) for task in it.tasks.values())
        assert refused + len(it.slots) == len(asked)
        assert it.admission.waiting_crops == 0 and it.admission.wait_ms() == 0

    run(test)


def test_the_wait_is_bounded_in_milliseconds_as_they_are_measured() -> None:
    async def test() -> None:
        it = bench(max_wait_s=1.0)
        slow(it.admission, 50)  # half a second a photograph
        for name in "abcd":
            await it.ask(name, "one")
        error = it.tasks["d"].exception()
        assert isinstance(error, Overloaded) and "30 crops wait, about 1.5 s" in str(error)
        assert it.admission.retry_after_s() == 2
        with pytest.raises(Overloaded):
            it.admission.check(Work("one", "alexnet", Crops.TEN))
        await it.end("a")
        it.admission.check(Work("one", "alexnet", Crops.TEN))
        await it.end_all()

    run(test)


def test_work_that_is_alone_is_let_in_whatever_it_costs() -> None:
    async def test() -> None:
        it = bench(max_waiting_crops=1, max_wait_s=0.001)
        slow(it.admission, 1000)
        await it.ask("a")
        assert it.slots == [("a", 0)]
        await it.end_all()

    run(test)


def test_what_runs_side_by_side_shortens_the_retry_time() -> None:
    async def test() -> None:
        it = bench(places=4)
        slow(it.admission, 20)
        for index in range(40):
            await it.ask(str(index), "one")
        assert it.admission.retry_after_s() == 2
        await it.end_all()
        assert it.admission.retry_after_s() == 1

    run(test)


def test_a_single_request_passes_a_hundred_of_another_client() -> None:
    async def test() -> None:
        it = bench(max_waiting_crops=10_000, max_wait_s=1e9)
        for index in range(100):
            await it.ask(f"many {index}", "many")
        await it.ask("one")
        await it.end("many 0")
        assert [name for name, _ in it.slots] == ["many 0", "one"]
        await it.end_all()

    run(test)


def test_where_there_is_no_room_the_client_with_the_most_waiting_loses_its_newest() -> None:
    async def test() -> None:
        it = bench(max_waiting_crops=50)
        for index in range(5):
            await it.ask(f"many {index}", "many")
        it.admission.check(Work("one", "alexnet", Crops.TEN))
        await it.ask("one")
        assert isinstance(it.tasks["many 4"].exception(), Overloaded)
        assert it.admission.waiting_crops == 50
        await it.ask("many 5", "many")  # with as much as anybody it loses nothing but its own
        assert isinstance(it.tasks["many 5"].exception(), Overloaded)
        await it.end_all()
        assert ("one", 0) in it.slots

    run(test)


def test_a_client_that_leaves_the_queue_costs_nothing_and_gets_its_share_back() -> None:
    async def test() -> None:
        it = bench()
        await it.ask("busy")
        for index in range(3):
            await it.ask(f"leaves {index}", "fickle")
            it.tasks[f"leaves {index}"].cancel()
        await settle()
        assert it.admission.waiting_crops == 10
        await it.ask("patient")
        await it.ask("stays", "fickle")
        await it.end("busy")
        assert it.slots[-1] == ("patient", 0)
        await it.end("patient")
        assert it.slots == [("busy", 0), ("patient", 0), ("stays", 0)]
        await it.end_all()

    run(test)


def test_a_slot_given_in_the_moment_of_leaving_is_not_lost() -> None:
    async def test() -> None:
        it = bench()
        await it.ask("busy")
        await it.ask("leaves")
        await it.ask("stays")
        it.ends["busy"].set()
        await asyncio.sleep(0)  # its slot has gone to the next, which has not run yet
        assert it.tasks["busy"].done() and it.slots == [("busy", 0)]
        it.tasks["leaves"].cancel()
        await settle()
        assert it.slots == [("busy", 0), ("stays", 0)]
        await it.end_all()

    run(test)


def test_what_cannot_have_its_turn_in_time_is_refused_at_once() -> None:
    async def test() -> None:
        it = bench(max_wait_s=1e9)
        slow(it.admission, 100)  # a second a photograph
        for index in range(4):
            await it.ask(f"many {index}", "many")
        soon = asyncio.get_running_loop().time() + 2.5
        await it.ask("impatient", "many", deadline_s=soon)
        error = it.tasks["impatient"].exception()
        assert isinstance(error, Overloaded) and "4.0 s" in str(error) and "2.5 s are left" in str(error)
        await it.ask("another", deadline_s=soon)  # waits for one of the others at most
        assert not it.tasks["another"].done()
        await it.end("many 0")
        assert it.slots[-1] == ("another", 0)
        await it.end_all()

    run(test)


def test_a_turn_after_the_deadline_is_not_used() -> None:
    async def test() -> None:
        it = bench()
        await it.ask("a", deadline_s=asyncio.get_running_loop().time() - 1)
        assert isinstance(it.tasks["a"].exception(), DeadlineExceeded) and not it.slots
        await it.ask("b")
        assert it.slots == [("b", 0)] and it.admission.waiting_crops == 10
        await it.end_all()

    run(test)


def test_a_slot_is_given_back_when_the_work_fails() -> None:
    async def test() -> None:
        admission = Admission(Limits())
        for _ in range(10):
            with pytest.raises(ZeroDivisionError):
                async with admission.slot(Work("", "alexnet", Crops.TEN)):
                    raise ZeroDivisionError
        assert admission.waiting_crops == 0

    run(test)


def test_brownout_serves_fewer_crops_where_more_would_wait_too_long_and_lets_more_in() -> None:
    async def asked(brownout: Brownout | None) -> tuple[list[int], int]:
        it = bench(max_waiting_crops=100, max_wait_s=1e9, brownout=brownout)
        slow(it.admission, 10)  # a tenth of a second a photograph, 10 ms with one crop
        for index in range(60):
            await it.ask(str(index), str(index))
        for index in range(60):
            if not it.tasks[str(index)].done():
                await it.end(str(index))
        refused = sum(isinstance(task.exception(), Overloaded) for task in it.tasks.values())
        return [level for _, level in it.slots], refused

    async def test() -> None:
        levels, refused = await asked(None)
        assert set(levels) == {0} and refused == 50
        levels, refused = await asked(Brownout(target_ms=200))
        assert refused == 0 and len(levels) == 60
        assert levels[0] == 0 and max(levels) == 2 and levels[-1] == 0, "service returns with the calm"
        assert 1 in levels
        assert levels[1] == 2 and sorted(levels[1:], reverse=True) == levels[1:]

    run(test)


def test_who_insists_on_all_crops_counts_in_full_even_in_a_brownout() -> None:
    async def test() -> None:
        it = bench(max_waiting_crops=30, max_wait_s=1e9, brownout=Brownout(target_ms=1))
        for name in "abcd":
            await it.ask(name, "one", may_degrade=False)
        assert isinstance(it.tasks["d"].exception(), Overloaded)
        await it.end_all()

    run(test)


