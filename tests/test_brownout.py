"""Brownout's policy: as much service as the wait allows, without flickering; and the costs it goes by."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.brownout import Brownout
from serving.contract import CROP_COUNT, Crops
from serving.costs import FIRST_GUESS_MS_PER_CROP, LEVELS, Costs, crops_by_level

WAITS = st.floats(0, 5000).map(lambda ms: (10 * ms, 2 * ms, ms))


@given(st.lists(WAITS, min_size=1, max_size=50), st.floats(1, 5000))
def test_service_is_the_fullest_that_the_wait_allows(
    waits: list[tuple[float, float, float]], target: float
) -> None:
    brownout = Brownout(target)
    for wait in waits:
        before = brownout.level
        level = brownout.update(wait)
        assert level == 2 or wait[level] <= target, "less than full service, and still too slow"
        if level < before:
            assert wait[level] <= target / 2, "back only with room to spare"
        if level > 0:
            assert wait[level - 1] > target / 2, "fewer crops than would be needed"


def test_a_wait_around_the_target_does_not_make_it_flicker() -> None:
    brownout = Brownout(100)
    levels = {brownout.update((wait, wait / 5, wait / 10)) for wait in (120, 95, 105, 60, 99, 101, 51)}
    assert levels == {1}


@given(st.sampled_from(list(Crops)))
def test_a_level_never_asks_for_more_crops_than_the_request(crops: Crops) -> None:
    degraded, kept = (crops_by_level(crops, may_degrade=allowed) for allowed in (True, False))
    assert set(kept) == {CROP_COUNT[crops]}
    assert degraded[0] == CROP_COUNT[crops] and list(degraded) == sorted(degraded, reverse=True)
    assert all(count <= level for count, level in zip(degraded, LEVELS, strict=True))


def test_costs_are_those_measured_of_this_model_and_guessed_for_other_numbers_of_crops() -> None:
    costs = Costs()
    assert costs.ms("a", 10) == 10 * FIRST_GUESS_MS_PER_CROP
    for _ in range(3):
        costs.measured("a", 10, 70)
    assert costs.ms("a", 10) == 70 and costs.ms("a", 1) == 7 and costs.ms("b", 1) == FIRST_GUESS_MS_PER_CROP
    for _ in range(3):
        costs.measured("a", 1, 13)
    assert costs.ms("a", 1) == 13 and costs.ms("a", 2) == 26
    for _ in range(4):
        costs.measured("a", 10, 140)
    assert costs.ms("a", 10) == 70, "a moment when the machine was busy"
    for _ in range(5):
        costs.measured("a", 10, 140)
    assert costs.ms("a", 10) == 140


def test_a_slow_first_inference_turns_nobody_away() -> None:
    costs = Costs()
    costs.measured("a", 10, 2000)
    assert costs.ms("a", 10) == 10 * FIRST_GUESS_MS_PER_CROP
