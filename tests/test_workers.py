"""Several workers on one port: what they count together, one that dies, and the end of all."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from processes import Gateway, gateway
from prometheus_client.parser import text_string_to_metric_families
from support import encoded, picture, run_alexnet, tiny_repository
from test_stopping import HEAD, JPEG, answered, refuses, until

from serving.settings import Settings

PHOTO = encoded(picture(43))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """Where the gateways of this test put what is temporary."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


@contextmanager
def two(repository: Path, temporary: Path, **settings: object) -> Iterator[Gateway]:
    with gateway(
        repository, under=("env", f"TMPDIR={temporary}"), workers=2, decode_workers=1, **settings
    ) as server:
        try:
            yield server
        finally:
            if server.process.poll() is None:  # a parent that is killed takes its workers with it
                server.terminate()
                server.end()


def workers_of(server: Gateway) -> list[int]:
    """Their processes, the oldest first."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return sorted(map(int, children))


@contextmanager
def asleep(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: re.search(r"^State:\s+T", Path(f"/proc/{pid}/status").read_text(), re.M) is not None)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def ask(server: Gateway, count: int) -> None:
    for _ in range(count):
        answer = httpx.post(f"{server.url}/classify?crops=center", content=PHOTO, headers=JPEG, timeout=20)
        assert answer.status_code == 200


def sums(url: str) -> dict[str, float]:
    """Each name's values, added over its labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=20).text):
        for sample in family.samples:
            assert "pid" not in sample.labels
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def test_each_answers_on_the_one_port_and_tells_what_all_have_counted(
    repository: Path, temporary: Path
) -> None:
    with two(repository, temporary, ops_port=0) as server:
        first, second = workers_of(server)
        for sleeper, count in ((first, 2), (second, 3)):  # so it is known who answers
            with asleep(sleeper):
                ask(server, count)
                assert httpx.post(f"{server.url}/classify", content=b"no photograph").status_code == 415
        for sleeper in (first, second):
            with asleep(sleeper):
                told = sums(server.ops_url)
                assert told["alexnet_answers_total"] == 5
                assert told["alexnet_upload_bytes_count"] == 5
                assert told["alexnet_upload_bytes_sum"] == 5 * len(PHOTO)
                assert told["alexnet_refusals_total"] == 2
                assert told["alexnet_requests_in_flight"] == 0
        assert httpx.get(f"{server.url}/metrics").status_code == 404


def test_one_that_is_killed_is_replaced_and_nothing_counted_is_lost_or_stays_in_flight(
    repository: Path, temporary: Path
) -> None:
    with two(repository, temporary) as server:
        victim, other = workers_of(server)
        with asleep(other):
            ask(server, 2)
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
                connection.sendall(HEAD % len(PHOTO) + PHOTO[:100])
                until(lambda: sums(server.url)["alexnet_requests_in_flight"] == 1)
                os.kill(victim, signal.SIGKILL)
                until(lambda: any("is ready, process" in line for line in server.log))
        alive = workers_of(server)
        assert len(alive) == 2 and other in alive and victim not in alive
        told = sums(server.url)
        assert told["alexnet_answers_total"] == 2
        assert told["alexnet_requests_in_flight"] == 0
        with asleep(other):  # its successor counts on from there
            ask(server, 3)
            assert sums(server.url)["alexnet_answers_total"] == 5
        assert len(list(temporary.glob("alexnet-metrics-*/counter_*.db"))) == 2


def test_sigterm_drains_each_of_them_and_leaves_nothing(repository: Path, temporary: Path) -> None:
    with two(repository, temporary) as server:
        assert [folder.stat().st_mode & 0o777 for folder in temporary.glob("alexnet-metrics-*")] == [0o700]
        pids, held = workers_of(server), []
        for sleeper in pids:  # an upload at each that has begun
            with asleep(sleeper):
                held.append(socket.create_connection(("127.0.0.1", server.port), timeout=20))
                held[-1].sendall(HEAD % len(PHOTO) + PHOTO[:100])
                assert httpx.get(f"{server.url}/livez", timeout=20).status_code == 200
        until(lambda: sums(server.url)["alexnet_requests_in_flight"] == 2)
        server.terminate()
        until(lambda: refuses(server.port))
        assert server.process.poll() is None and workers_of(server) == pids, "they wait for the rest"
        for connection in held:
            with connection:
                connection.sendall(PHOTO[100:])
                assert answered(connection).startswith(b"HTTP/1.1 200")
        assert server.end() == 0
    assert list(temporary.glob("alexnet-metrics-*")) == []
    assert not any("Traceback" in line for line in server.log), "".join(server.log)


def test_they_end_when_their_parent_is_killed(repository: Path, temporary: Path) -> None:
    with two(repository, temporary) as server:
        server.process.kill()
        until(lambda: refuses(server.port))


def test_a_model_that_cannot_be_loaded_and_a_port_that_is_taken_end_it_with_a_line(
    repository: Path, tmp_path: Path
) -> None:
    broken = tiny_repository(tmp_path)
    (broken / "alexnet" / "1" / "model.onnx").write_bytes(b"no network")
    ran = run_alexnet("serve", "--port", "0", "--repository", broken, "--workers", "2")
    assert ran.returncode == 1 and ran.stdout == "" and "Traceback" not in ran.stderr
    assert len(re.findall("^alexnet: ", ran.stderr, re.M)) == 1, ran.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = run_alexnet("serve", "--port", str(port), "--repository", repository, "--workers", "2")
    assert ran.returncode == 1
    assert ran.stderr == f"alexnet: cannot listen on 127.0.0.1 port {port}: Address already in use\n"


def test_cores_are_shared_among_workers_unless_said() -> None:
    cores = Settings().infer_threads
    assert Settings(workers=2).infer_threads == Settings(workers=2).decode_workers == max(1, cores // 2)
    assert Settings(workers=10_000).infer_threads == 1
    assert Settings(workers=2, infer_threads=7).infer_threads == 7
