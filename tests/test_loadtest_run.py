"""Load tests against servers that answer: a gateway over a fake engine, a fake Triton, and faults."""

from __future__ import annotations

import asyncio
import csv
import json
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from closed_loop import closed_loop, multipart
from fake_triton import fake_triton
from light_client import LightClient
from open_loop import arrivals, mixed_urls, open_loop, open_loops
from photographs import CROPS, generated
from servers import free_port, memory, started
from support import FakeBackend, serving

from serving.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
FILES = generated(2, (256, 256))
BODIES = [multipart(file) for file in FILES]


def test_locust_s_users_reach_the_gateway_and_triton_and_the_answers_stages_are_kept(tmp_path: Path) -> None:
    for number, file in enumerate(FILES):
        (tmp_path / f"{number}.jpg").write_bytes(file)
    ramp, table = tmp_path / "ramp.json", tmp_path / "run"
    with serving(Settings(port=0), FakeBackend()) as url, fake_triton() as triton:
        command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless"]
        command += ["--host", url, "--triton", triton.address, "--images", str(tmp_path)]
        command += ["--steps", "4", "--step-s", "3", "--ramp-json", str(ramp), "--csv", str(table)]
        done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(ramp.read_text())
    [step] = told["steps"]
    assert step["users"] == 4 and step["failed"] == 0 and len(step["latencies_ms"]) > 4
    assert set(told["stages_ms"]) >= {"decode", "queue", "infer", "total"}
    with (tmp_path / "run_stats.csv").open() as stats:
        rows = {(row["Type"], row["Name"]): row for row in csv.DictReader(stats)}
    assert int(rows["gRPC", "alexnet ten crops"]["Request Count"]) > 0
    assert int(rows["POST", "/classify ten"]["Request Count"]) > 0
    requests = sum(int(r["Request Count"]) for (kind, _), r in rows.items() if kind in ("POST", "gRPC"))
    assert int(rows["", "Aggregated"]["Request Count"]) == requests  # stages are not requests


def test_a_closed_loop_counts_answers_and_leaves_no_thread() -> None:
    before = threading.active_count()
    with serving(Settings(port=0), FakeBackend()) as url:
        load = closed_loop(url, "/classify?crops=center", BODIES, clients=3, seconds=0.3)
    assert load.images_per_s > 0 and load.refused == load.degraded == 0
    assert all(ms > 0 for ms in load.latencies_ms)
    assert threading.active_count() <= before


def test_an_open_loop_asks_for_every_kind_of_crops_and_keeps_the_stages() -> None:
    with serving(Settings(port=0), FakeBackend()) as url:
        [answers] = asyncio.run(open_loops(mixed_urls(url), BODIES, [20], 0.8))
    assert answers.statuses == {"200": len(arrivals(20, 0.8))}
    assert len(answers.stages_ms["infer"]) == len(answers.latencies_ms)


def test_mixed_urls_keep_the_shares() -> None:
    urls = mixed_urls("http://gateway")
    for crops, share in CROPS.items():
        assert urls.count(f"http://gateway/classify?crops={crops}") == pytest.approx(share * len(urls))


def test_latency_counts_from_the_intended_moment_so_a_stall_is_seen_by_all_who_came_during_it() -> None:
    """No coordinated omission: a closed loop would have one slow answer here, and the rest quick."""
    stall_s, rate, seconds = 0.4, 40.0, 0.3

    async def stalled() -> list[float]:
        over = asyncio.get_running_loop().time() + stall_s

        async def answer(_url: str, _body: bytes) -> tuple[int, bytes]:
            await asyncio.sleep(max(0.0, over - asyncio.get_running_loop().time()))
            return 200, b"{}"

        return (await open_loop(answer, ["http://gateway/"], [b""], rate, seconds)).latencies_ms

    latencies = asyncio.run(stalled())
    due_ms = 1000 * arrivals(rate, seconds)
    assert len(latencies) == len(due_ms) > 5
    for latency, due in zip(sorted(latencies, reverse=True), due_ms, strict=True):
        assert latency >= 1000 * stall_s - due - 20


def test_errors_of_the_connection_are_counted_and_have_no_latency() -> None:
    url = f"http://127.0.0.1:{free_port()}"

    async def alone() -> dict[str, int]:
        async with LightClient(5) as client:
            answers = await open_loop(client.post, [url], [b""], 20, 0.3)
        assert answers.latencies_ms == []
        return answers.statuses

    assert set(asyncio.run(alone())) == {"ConnectionRefusedError"}


def test_the_light_client_keeps_connections_and_tells_status_and_body() -> None:
    async def asked(url: str) -> list[tuple[int, bytes]]:
        async with LightClient(20) as client:
            one = [await client.post(f"{url}/classify?crops=center", BODIES[0]) for _ in range(3)]
            assert sum(map(len, client.idle.values())) == 1
            at_once = (client.post(f"{url}/classify?crops={c}", BODIES[1]) for c in ("ten", "center", "none"))
            found = one + await asyncio.gather(*at_once)
            assert sum(map(len, client.idle.values())) == 3
            return found

    with serving(Settings(port=0), FakeBackend()) as url:
        answers = asyncio.run(asked(url))
    assert [status for status, _ in answers] == [200] * 5 + [400]
    crops = [json.loads(body)["crops"] for status, body in answers if status == 200]
    assert crops == [1, 1, 1, 10, 1]


def test_a_connection_that_the_server_may_close_at_any_moment_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def connections(kept_s: float) -> int:
        monkeypatch.setattr("light_client.KEPT_S", kept_s)
        async with LightClient(20) as client:
            for _ in range(3):
                assert (await client.post(f"{url}/classify?crops=center", BODIES[0]))[0] == 200
            return sum(map(len, client.idle.values()))

    with serving(Settings(port=0), FakeBackend()) as url:
        assert asyncio.run(connections(4.0)) == 1
        assert asyncio.run(connections(0.0)) == 3


@pytest.mark.parametrize(
    ("said", "error"),
    [(b"", "ConnectionResetError"), (b"SSH-2.0-x\r\n", "HttpParserError"), (None, "TimeoutError")],
)
def test_what_is_no_answer_is_an_error_and_the_next_one_has_a_connection_of_its_own(
    said: bytes | None, error: str
) -> None:
    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if said is None:
            await reader.read()  # until the client leaves
        else:
            writer.write(said)
        writer.close()

    async def statuses() -> dict[str, int]:
        server = await asyncio.start_server(served, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        async with server, LightClient(0.2) as client:
            answers = await open_loop(client.post, [f"http://{host}:{port}/"], [b"photograph"], 40, 0.2)
            assert not any(client.idle.values())
        return answers.statuses

    found = asyncio.run(statuses())
    assert set(found) == {error} and found[error] == len(arrivals(40, 0.2)) > 2


SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def test_a_server_is_weighed_and_stopped_with_all_that_it_started() -> None:
    port = free_port()
    with started([sys.executable, "-c", SERVER, str(port)], port, b"", {}) as server:
        assert server.ready_s > 0
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        weight = memory(server.pid)
        assert weight.processes == len(family) == 2
        assert 0 < weight.pss <= weight.rss
    assert not any(each.is_running() for each in family)


def test_a_server_that_ends_at_once_is_an_error_that_says_what_it_said() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(RuntimeError, match="no such model"), started(command, free_port(), b"", {}):
        pass
