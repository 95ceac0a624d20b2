"""Decoders in processes: one that dies, hangs or wants too much costs its own picture and nothing else."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import gateway
from support import FakeBackend, encoded, picture, serving, tiny_repository

from serving.decoder import Bounds, Failure, Source, Upload, decoded, worded
from serving.decoders import Decoders, parsed
from serving.errors import DecoderCrashed, DecoderOutOfMemory, DecodeTimeout, Stopping, UndecodableImage
from serving.preprocess import Pixels, decode_square
from serving.settings import Settings
from serving.sources import Item

PHOTO = encoded(picture(1))
JPEG = {"content-type": "image/jpeg"}


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@dataclass(frozen=True)
class Trap(Upload):
    """Calls a function in the process that unpickles it."""

    data: bytes = b""
    calls: tuple[Any, ...] = ()

    def __reduce__(self) -> Any:
        return self.calls


DEADLY = Trap(calls=(os._exit, (9,)))
ENDLESS = Trap(calls=(time.sleep, (3600,)))
TRAPS = {b"die": DEADLY, b"hang": ENDLESS}


class Trapped(Decoders):
    """Uploads of these words do to their worker what the words say."""

    def decode(self, source: Source) -> Pixels | Failure:
        return super().decode(TRAPS.get(source.read(10), source))


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    made = Decoders(1, Bounds(timeout_s=1))
    yield made
    made.close()


# --- the workers ----------------------------------------------------------------------------------


def test_a_worker_decodes_as_the_calling_process_would(decoders: Decoders, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(PHOTO)
    for source in (Upload(PHOTO), Item("photo", str(tmp_path / "photo.jpg"))):
        square = decoders.decode(source)
        assert not isinstance(square, Failure)
        np.testing.assert_array_equal(square, decode_square(PHOTO))
        assert square.tobytes() == decoded(source)


@pytest.mark.parametrize(
    ("data", "reason", "error"),
    [
        (b"", "empty", UndecodableImage),
        (PHOTO[:500], "undecodable", UndecodableImage),
    ],
)
def test_what_cannot_be_decoded_is_told_as_by_the_decoder(
    decoders: Decoders, data: bytes, reason: str, error: type[Exception]
) -> None:
    failure = decoders.decode(Upload(data))
    assert isinstance(failure, Failure) and failure.reason == reason
    with pytest.raises(error) as raised:
        decode_square(data)
    assert str(raised.value) == failure.detail == str(failure.error)
    assert type(failure.error) is error


def test_one_that_dies_or_hangs_costs_one_file_and_is_replaced(decoders: Decoders) -> None:
    assert not isinstance(decoders.decode(Upload(PHOTO)), Failure)
    before = decoders.pids
    died = decoders.decode(DEADLY)
    assert isinstance(died, Failure)
    assert died == Failure("decoder_crashed", "its decoder died with status 9")
    assert type(died.error) is DecoderCrashed and "status" not in str(died.error)
    assert not isinstance(decoders.decode(Upload(PHOTO)), Failure)
    assert decoders.pids != before
    started = time.monotonic()
    hung = decoders.decode(ENDLESS)
    assert time.monotonic() < started + 10
    assert isinstance(hung, Failure)
    assert hung == Failure("decode_timeout", "not decoded within 1 s")
    assert type(hung.error) is DecodeTimeout
    assert not isinstance(decoders.decode(Upload(PHOTO)), Failure)
    assert not any(psutil.pid_exists(pid) for pid in before), "none is left, not even a zombie"


def test_one_that_does_not_even_read_is_given_up_as_soon(decoders: Decoders) -> None:
    large = Upload(PHOTO + bytes(5_000_000))
    assert not isinstance(decoders.decode(large), Failure)
    os.kill(decoders.pids[0], signal.SIGSTOP)
    assert decoders.decode(large) == Failure("decode_timeout", "not decoded within 1 s")
    assert not isinstance(decoders.decode(large), Failure)


def test_one_that_is_lost_while_idle_costs_nothing(decoders: Decoders) -> None:
    for _ in range(3):
        assert not isinstance(decoders.decode(Upload(PHOTO)), Failure)
        os.kill(decoders.pids[0], signal.SIGKILL)
        until(lambda: psutil.Process(decoders.pids[0]).status() == psutil.STATUS_ZOMBIE)
    assert not isinstance(decoders.decode(Upload(PHOTO)), Failure)


def test_the_end_of_a_worker_is_its_parent_s_to_say(decoders: Decoders) -> None:
    """systemd sends SIGTERM to every process of a service; there is still something to finish."""
    assert not isinstance(decoders.decode(Upload(PHOTO)), Failure)
    before = decoders.pids
    os.kill(before[0], signal.SIGTERM)
    assert not isinstance(decoders.decode(Upload(PHOTO)), Failure)
    assert decoders.pids == before


def test_a_worker_holds_neither_the_engine_nor_our_settings(
    decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALEXNET_TRITON_ADMIN_KEY", "secret")
    decoders.decode(DEADLY)
    assert not isinstance(decoders.decode(Upload(PHOTO)), Failure)
    worker = psutil.Process(decoders.pids[0])
    assert not [name for name in worker.environ() if name.startswith("ALEXNET_")]
    mapped = " ".join(each.path for each in worker.memory_maps())
    assert "PIL" in mapped
    assert not [name for name in ("numpy", "onnxruntime", "uvloop", "pydantic") if name in mapped]
    assert worker.num_threads() == 1
    assert worker.memory_info().rss < 40e6


def test_what_a_library_thinks_of_a_file_stays_out_of_the_log(
    decoders: Decoders, capfd: pytest.CaptureFixture[str]
) -> None:
    tiff = encoded(picture(3), "TIFF", compression="tiff_lzw")
    half = tiff[:20_000] + bytes(1000) + tiff[21_000:]
    decoded(Upload(half))
    assert "LZW" in capfd.readouterr().err, "so it would have been written"
    decoders.decode(DEADLY)
    assert isinstance(decoders.decode(Upload(half)), Failure)
    assert capfd.readouterr().err == ""


def test_memory_is_bounded_and_what_was_taken_is_given_back() -> None:
    large = encoded(picture(2, 60, 40).resize((6000, 4000)), "PNG", compress_level=1)
    decoders = Decoders(1, Bounds(max_memory_bytes=40_000_000))
    try:
        failure = decoders.decode(Upload(large))
        assert isinstance(failure, Failure) and failure.reason == "out_of_memory"
        assert type(failure.error) is DecoderOutOfMemory
        assert not isinstance(decoders.decode(Upload(PHOTO)), Failure)
        assert len(decoders.pids) == 1
    finally:
        decoders.close()
    decoders = Decoders(1)
    try:
        assert not isinstance(decoders.decode(Upload(PHOTO)), Failure)
        before = psutil.Process(decoders.pids[0]).memory_info().rss
        assert not isinstance(decoders.decode(Upload(large)), Failure)
        assert psutil.Process(decoders.pids[0]).memory_info().rss < before + 40e6
    finally:
        decoders.close()


def test_closing_ends_one_that_hangs_and_whoever_waits_for_it_is_told() -> None:
    decoders = Decoders(1, Bounds(timeout_s=100))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(decoders.decode, ENDLESS)
        until(lambda: decoders.pids)
        decoders.close()
        with pytest.raises(Stopping):
            waiting.result(20)
    with pytest.raises(Stopping):
        decoders.decode(Upload(PHOTO))
    assert decoders.pids == []


class Broken(Upload):
    """Reading it fails in a way that nobody foresaw."""

    def read(self, _: int, /) -> bytes:
        raise RuntimeError(f"cannot read {object()}")


def test_what_a_decoder_says_is_the_same_on_every_run() -> None:
    failure = Failure("decoder_crashed", "RuntimeError: cannot read <object object>")
    assert decoded(Broken(b"")) == failure


@given(st.binary(max_size=300) | st.just(b"d" + bytes(256 * 256 * 3)) | st.binary().map(b"f".__add__))
def test_whatever_a_worker_says_is_a_square_or_words_or_refused(answer: bytes) -> None:
    try:
        said = parsed(bytearray(answer))
    except ValueError:
        return
    if isinstance(said, Failure):
        assert worded(said)[: len(answer)] == answer
        assert str(said.error)
    else:
        assert said.shape == (256, 256, 3) and answer[:1] == b"d"


# --- behind the gateway ---------------------------------------------------------------------------


@contextmanager
def trapped(workers: int, timeout_s: float = 1) -> Iterator[tuple[httpx.Client, Decoders]]:
    decoders = Trapped(workers, Bounds(timeout_s=timeout_s))
    limits = httpx.Limits(max_connections=60)
    with (
        serving(Settings(pulse_s=0), FakeBackend(), decoders=decoders) as url,
        httpx.Client(base_url=url, timeout=30, limits=limits) as client,
    ):
        yield client, decoders


def classify(client: httpx.Client, data: bytes) -> httpx.Response:
    return client.post("/classify?crops=center", content=data, headers=JPEG)


def assert_problem(answer: httpx.Response, reason: str, client: httpx.Client) -> None:
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert "status" not in answer.json()["detail"]
    assert f'alexnet_refusals_total{{reason="{reason}",status="422"}} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("killed", [True, False])
def test_a_decoder_that_is_killed_or_stuck_in_a_request_is_a_422_and_the_next_is_answered(
    killed: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_it = tmp_path / "has it"
    stuck = f"import pathlib, time; pathlib.Path({str(has_it)!r}).touch(); time.sleep(3600)"
    monkeypatch.setitem(TRAPS, b"stuck", Trap(calls=(exec, (stuck,))))
    with trapped(1, 30 if killed else 1) as (client, decoders), ThreadPoolExecutor(1) as pool:
        assert classify(client, PHOTO).status_code == 200
        (pid,) = decoders.pids
        answer = pool.submit(classify, client, b"stuck")
        until(has_it.exists)
        if killed:
            os.kill(pid, signal.SIGKILL)
        assert_problem(answer.result(20), "decoder_crashed" if killed else "decode_timeout", client)
        assert "an upload cost its decoder" in caplog.text
        assert classify(client, PHOTO).status_code == 200
        assert pid not in decoders.pids


def test_among_fifty_at_once_only_those_that_crash_or_hang_are_refused() -> None:
    uploads = [(b"die", b"hang", PHOTO, PHOTO, PHOTO)[i % 5] if i < 25 else PHOTO for i in range(50)]
    with trapped(2, timeout_s=0.3) as (client, decoders), ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda data: classify(client, data), uploads))
        assert [each.status_code == 200 for each in answers] == [data == PHOTO for data in uploads]
        assert Counter(each.status_code for each in answers) == {200: 40, 422: 10}
        assert client.get("/readyz").status_code == client.get("/livez").status_code == 200
        assert len(decoders.pids) == 2
    assert decoders.pids == [], "closed with the gateway"


def test_a_picture_that_takes_more_memory_than_is_set_is_a_422() -> None:
    large = encoded(picture(2, 60, 40).resize((6000, 4000)), "PNG", compress_level=1)
    settings = Settings(pulse_s=0, decode_memory_bytes=40_000_000, decode_workers=1)
    with serving(settings, FakeBackend()) as url, httpx.Client(base_url=url, timeout=30) as client:
        assert_problem(classify(client, large), "decoder_out_of_memory", client)
        assert classify(client, PHOTO).status_code == 200


def test_a_gateway_that_is_told_to_end_ends_its_decoders_whatever_they_do(tmp_path: Path) -> None:
    with gateway(tiny_repository(tmp_path), request_timeout_s=1, pulse_s=0, decode_workers=2) as server:
        assert httpx.post(f"{server.url}/classify", content=PHOTO, headers=JPEG).status_code == 200
        workers = psutil.Process(server.process.pid).children(recursive=True)
        assert len(workers) == 2
        for worker in workers:
            worker.suspend()
        asked = threading.Thread(
            target=lambda: httpx.post(f"{server.url}/classify", content=PHOTO, headers=JPEG, timeout=20)
        )
        asked.start()
        until(lambda: "alexnet_waiting_crops 10.0" in httpx.get(f"{server.url}/metrics").text)
        server.terminate()
        assert server.end(15) == 0
        asked.join(10)
        assert not any(worker.is_running() for worker in workers)
    assert not any("Traceback" in line for line in server.log), "".join(server.log)


def test_decoders_do_not_outlive_a_gateway_that_is_killed(tmp_path: Path) -> None:
    with gateway(tiny_repository(tmp_path), pulse_s=0) as server:
        assert httpx.post(f"{server.url}/classify", content=PHOTO, headers=JPEG).status_code == 200
        workers = psutil.Process(server.process.pid).children(recursive=True)
        assert workers
        server.process.kill()
        server.process.wait(10)
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]
