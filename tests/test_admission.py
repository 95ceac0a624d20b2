"""Admission: crops counted, the limit kept, the retry time truthful."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.admission import Admission
from serving.errors import Overloaded


@given(st.lists(st.integers(1, 10), max_size=60), st.integers(10, 200))
def test_no_more_than_the_limit_is_ever_admitted(requests: list[int], limit: int) -> None:
    admission = Admission(limit)
    held = []
    for crops in requests:
        place = admission.admit(crops)
        fits = admission.waiting_crops + crops <= limit
        if fits:
            place.__enter__()
            held.append(place)
        else:
            with pytest.raises(Overloaded):
                place.__enter__()
        assert admission.waiting_crops <= limit
    for place in held:
        place.__exit__(None, None, None)
    assert admission.waiting_crops == 0


def test_a_place_is_given_back_when_the_work_fails() -> None:
    admission = Admission(10)
    with pytest.raises(ZeroDivisionError), admission.admit(10):
        raise ZeroDivisionError
    assert admission.waiting_crops == 0


def test_the_retry_time_follows_what_waits_and_how_long_it_takes() -> None:
    admission = Admission(1000)
    for _ in range(200):
        admission.measured(10, 0.2)  # 20 ms a crop
    with admission.admit(400):
        assert admission.retry_after_s() == 8
        with pytest.raises(Overloaded, match=r"400 crops wait.*retry in 8 s"), admission.admit(601):
            pass
    assert admission.retry_after_s() == 1


def test_what_runs_side_by_side_shortens_the_retry_time() -> None:
    admission = Admission(1000, concurrency=4)
    for _ in range(200):
        admission.measured(10, 0.2)
    with admission.admit(400):
        assert admission.retry_after_s() == 2
