"""What load tests send, when they send it, and what they conclude: without a server."""

from __future__ import annotations

import io
import statistics

import numpy as np
import pytest
from closed_loop import Window, multipart
from figures import percentiles, spread, table
from hypothesis import given
from hypothesis import strategies as st
from open_loop import Answers, answer_rows, arrivals, stage_rows
from photographs import SIZES, from_folder, generated, given_folder, mixed, resized, sizes
from PIL import Image
from ramp import Ramp, Step

from serving.contract import Crops
from serving.preprocess import prepare


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


# --- photographs -----------------------------------------------------------------------------------


def test_generated_photographs_are_the_same_for_the_same_seed_and_differ_among_themselves() -> None:
    files = generated(3, seed=5)
    assert files == generated(3, seed=5) != generated(3, seed=6)
    assert len(set(files)) == 3
    assert {opened(file).size for file in files} == {(500, 375)}


def test_a_generated_photograph_weighs_about_what_a_camera_s_does() -> None:
    """Imagenette's photographs need 0.8 to 3 bits a pixel at usual qualities; flat colour 0.1, noise 6."""
    bits = [8 * len(file) / (500 * 375) for file in generated(4)]
    assert all(0.5 < each < 4 for each in bits), bits


def test_generated_photographs_pass_the_gateway_s_preprocessing() -> None:
    crops = prepare(generated(1, (224, 300))[0], Crops.TEN)
    assert crops.shape == (10, 224, 224, 3)
    assert crops.std() > 20


@pytest.mark.parametrize("count", [1, 20, 40])
def test_sizes_keep_their_shares_and_some_stand_upright(count: int) -> None:
    drawn = [tuple(sorted(size, reverse=True)) for size in sizes(count)]
    assert len(drawn) == count
    for size, share in SIZES:
        assert abs(drawn.count(size) - share * count) <= 1
    if count == 40:
        assert 4 < sum(height > width for width, height in sizes(count)) < 25


def test_mixed_photographs_have_the_sizes_drawn() -> None:
    assert [opened(file).size for file in mixed(2, seed=3)] == sizes(2, seed=3)


def test_a_folder_s_files_are_taken_evenly_from_all_its_folders(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for name in ("a/1.jpg", "a/2.JPEG", "b/3.png", "b/4.webp", "b/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    assert from_folder(tmp_path) == [b"a/1.jpg", b"a/2.JPEG", b"b/3.png", b"b/4.webp"]
    assert from_folder(tmp_path, 2) == [b"a/1.jpg", b"b/4.webp"]
    with pytest.raises(SystemExit, match="no photographs"):
        from_folder(tmp_path / "absent")


def test_the_flag_comes_before_the_variable(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.delenv("ALEXNET_IMAGES", raising=False)
    assert given_folder(None) is None
    monkeypatch.setenv("ALEXNET_IMAGES", str(tmp_path))
    assert given_folder(None) == tmp_path
    assert given_folder(tmp_path / "flag") == tmp_path / "flag"


def test_resizing_keeps_proportions_and_cuts_the_centre() -> None:
    picture = Image.new("RGB", (600, 200), (200, 0, 0))
    picture.paste((0, 200, 0), (200, 0, 400, 200))  # the middle third
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    [file] = resized([buffer.getvalue()], (120, 120))
    done = np.asarray(opened(file)).astype(int)
    assert done.shape == (120, 120, 3)
    assert (done[:, 10:110, 1] > 150).all() and (done[:, 10:110, 0] < 60).all()


# --- figures ---------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_percentiles_are_ordered_and_lie_among_the_values(values: list[float]) -> None:
    found = percentiles(values)
    assert min(values) <= found.p50 <= found.p95 * (1 + 1e-12)
    assert found.p95 <= found.p99 * (1 + 1e-12) <= max(values) * (1 + 1e-11)
    assert found.p50 == pytest.approx(statistics.median(values))
    assert found.count == len(values)


def test_percentiles_interpolate() -> None:
    found = percentiles([float(n) for n in range(101)][::-1])
    assert (found.p50, found.p95, found.p99) == (50, 95, 99)


def test_percentiles_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentiles([])


def test_a_spread_tells_median_least_and_most() -> None:
    assert str(spread([3.0, 1.0, 2.26])) == "2.3 (1.0-3.0)"


def test_a_table_aligns_names_left_and_figures_right() -> None:
    assert table([["server", "ms"], ["a", "1.5"], ["longer-name", "200.0"]]) == [
        "server          ms",
        "a              1.5",
        "longer-name  200.0",
    ]


# --- the closed loop's window ----------------------------------------------------------------------


def test_the_window_opens_when_every_client_has_answered_and_ends_when_each_has_again() -> None:
    window = Window(clients=2, seconds=0.8)
    window.note(0, 0.0, 0.5, 200, degraded=False)
    window.note(0, 0.5, 0.9, 200, degraded=False)
    assert window.opened is None
    window.note(1, 0.0, 1.0, 200, degraded=False)  # opens it, and is not counted
    window.note(0, 0.9, 1.4, 200, degraded=True)
    window.note(0, 1.4, 1.9, 200, degraded=False)  # long enough, but the other one still waits
    window.note(1, 1.0, 2.5, 503, degraded=False)  # ends it
    window.note(0, 1.9, 2.6, 200, degraded=False)  # too late
    load = window.load()
    assert load.images_per_s == pytest.approx(2 / 1.5)
    assert load.latencies_ms == pytest.approx([500, 500])
    assert (load.refused, load.degraded) == (1, 1)


def test_answers_in_bursts_are_not_counted_as_a_higher_rate() -> None:
    """Four answers each second, within milliseconds: 4 a second, whichever client is the last."""
    window = Window(clients=4, seconds=2.5)
    for second in range(1, 8):
        for place in range(4):
            window.note((place + second) % 4, second - 1.0, second + 0.001 * place, 200, degraded=False)
    assert window.load().images_per_s == pytest.approx(4, rel=0.01)


def test_a_server_that_works_on_all_at_once_is_measured_by_whole_turns() -> None:
    """32 clients, answered one shortly after the other at the end of each 4 s: 8 a second."""
    window = Window(clients=32, seconds=2.5)
    for turn in range(1, 5):
        for client in range(32):
            window.note(client, 4.0 * (turn - 1), 4.0 * turn + 0.03 * client, 200, degraded=False)
    assert window.load().images_per_s == pytest.approx(8, rel=0.05)


def test_a_server_that_never_answers_is_an_error_and_no_rate() -> None:
    with pytest.raises(RuntimeError, match="no answers"):
        Window(clients=1, seconds=1).load()


def test_a_form_holds_the_photograph_as_it_is() -> None:
    body = multipart(b"\xff\xd8\r\n--photo")
    assert b'name="file"' in body and b"\r\n\r\n\xff\xd8\r\n--photo\r\n--photograph--\r\n" in body


# --- arrivals --------------------------------------------------------------------------------------


@given(st.floats(0.5, 200), st.integers(0, 100))
def test_arrivals_come_in_order_within_the_time(rate: float, seed: int) -> None:
    times = arrivals(rate, 5.0, seed)
    assert (np.diff(times) >= 0).all()
    assert ((times >= 0) & (times < 5)).all()
    assert np.array_equal(times, arrivals(rate, 5.0, seed))


def test_arrivals_are_a_poisson_process() -> None:
    """As many as the rate says, and gaps that are as irregular as chance: spread equal to mean."""
    times = arrivals(50, 400, seed=3)
    assert len(times) == pytest.approx(50 * 400, rel=0.03)
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    a_second = np.bincount(times.astype(int), minlength=400)
    assert a_second.var() / a_second.mean() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("rate", "seconds"), [(0, 1), (-1, 1), (1, 0)])
def test_arrivals_without_a_rate_are_refused(rate: float, seconds: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        arrivals(rate, seconds)


def test_only_answered_photographs_have_a_latency_and_stages() -> None:
    answers = Answers(rate=2, seconds=2)
    answers.note("200", 100.0, {"timing_ms": {"infer": 40.0, "queue": 1.0}, "degraded": True})
    answers.note("200", 300.0, {"timing_ms": {"infer": 60.0, "queue": 3.0}})
    answers.note("503", 5.0, {})
    answers.note("ReadTimeout", 30_000.0, {})
    row = dict(zip(answer_rows([answers])[0], answers.row(), strict=True))
    assert (row["sent"], row["answered/s"], row["p50 ms"], row["max"]) == ("4", "1.0", "200", "300")
    assert (row["degraded"], row["failed"]) == ("1", "1 x 503, 1 x ReadTimeout")
    assert stage_rows([answers])[1:] == [["infer", "50.0 / 59.0"], ["queue", "2.0 / 2.9"]]


# --- the ramp --------------------------------------------------------------------------------------


def step(users: int, per_s: float, failed: int = 0) -> Step:
    return Step(users, 10.0, tuple([100.0] * round(10 * per_s)), failed)


def test_the_ramp_ends_when_two_steps_in_a_row_bring_nothing() -> None:
    ramp = Ramp((1, 2, 4, 8, 16, 32))
    asked = []
    for per_s in (6, 10, 12, 12.1, 11.9, 99):
        users = ramp.next_users()
        if users is None:
            break
        asked.append(users)
        ramp.done.append(step(users, per_s))
    assert asked == [1, 2, 4, 8, 16]
    assert ramp.saturated and ramp.best == ramp.done[2]
    assert ramp.verdict() == "saturated at 4 users: 12.0 answers a second; more only wait longer"


def test_a_few_users_are_not_enough_to_call_it_saturated() -> None:
    ramp = Ramp((1, 2, 4, 8), [step(1, 9), step(2, 9), step(4, 9)])
    assert ramp.next_users() == 8
    ramp.done.append(step(8, 9))
    assert ramp.saturated and ramp.best == ramp.done[0]


def test_one_step_without_a_gain_may_be_chance() -> None:
    ramp = Ramp((1, 2, 4, 8), [step(1, 6), step(2, 6), step(4, 9)])
    assert not ramp.saturated
    assert ramp.next_users() == 8


def test_the_ramp_ends_where_many_are_refused() -> None:
    ramp = Ramp((1, 2, 4), [step(1, 6), step(2, 8, failed=10)])
    assert ramp.next_users() is None
    assert ramp.saturated


def test_a_ramp_that_still_grows_says_so() -> None:
    ramp = Ramp((1, 2), [step(1, 6), step(2, 12)])
    assert ramp.next_users() is None
    assert ramp.verdict().startswith("not saturated at 2 users")
    assert [row[0] for row in ramp.rows()] == ["users", "1", "2"]


def test_a_ramp_without_answers_has_no_verdict() -> None:
    ramp = Ramp((1,), [Step(1, 10, (), 0)])
    assert ramp.best is None
    assert ramp.verdict() == "no answers"
    assert ramp.rows()[1] == ["1", "0.0", "", "", "", "0", "0"]
