"""The gateway over Triton: a fake server over real gRPC with its faults one by one, and a real one."""

from __future__ import annotations

import asyncio
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx
import numpy as np
import pytest
from fake_triton import FakeTriton, FakeTritonProcess, fake_triton, full_queue
from support import ALEXNET, LABELS, QUIET, ROOT, encoded, picture, run_alexnet, triton_repository

from serving.backends import Inference, OnnxRuntimeBackend
from serving.contract import Crops
from serving.errors import DeadlineExceeded, EngineFailed, ModelNotReady, Overloaded, ServingError
from serving.postprocess import Label
from serving.preprocess import Pixels, prepare
from serving.settings import Settings
from serving.triton import LocalTriton, load_model
from serving.triton_backend import TritonBackend
from serving.triton_target import grpc_target

Serve = Callable[..., AbstractContextManager[str]]


def random_crops(count: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, 224, 224, 3), np.uint8)


def backend_of(servers: str, name: str = "alexnet") -> TritonBackend:
    return TritonBackend(servers, name, concurrency=8, keepalive_s=1)


@asynccontextmanager
async def connected(servers: str, name: str = "alexnet") -> AsyncIterator[TritonBackend]:
    backend = backend_of(servers, name)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


def stop(pid: int) -> None:
    """SIGSTOP, and wait until it has come: it takes a while on a busy machine."""
    os.kill(pid, signal.SIGSTOP)
    threads = list(Path(f"/proc/{pid}/task").iterdir())
    while any((thread / "stat").read_text().rpartition(")")[2].split()[0] != "T" for thread in threads):
        time.sleep(0.001)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def is_ready(backend: TritonBackend) -> bool:
    try:
        return backend.model is not None
    except ModelNotReady:
        return False


# --- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("servers", "target"),
    [
        ("127.0.0.1:8001", "ipv4:127.0.0.1:8001"),
        ("10.0.0.1:8001, 10.0.0.2:8101", "ipv4:10.0.0.1:8001,10.0.0.2:8101"),
        ("localhost:8001,127.0.0.1:8002", "ipv4:127.0.0.1:8001,127.0.0.1:8002"),
        ("[::1]:8001,[fd00::2]:8001", "ipv6:[::1]:8001,[fd00::2]:8001"),
        ("triton.models.svc:8001", "dns:///triton.models.svc:8001"),
    ],
)
def test_servers_become_one_grpc_target(servers: str, target: str) -> None:
    assert grpc_target(servers) == target


@pytest.mark.parametrize(
    ("servers", "words"),
    [
        ("triton", "HOST:PORT"),
        ("triton:0", "'triton:0'"),
        ("triton:99999", "'triton:99999'"),
        ("10.0.0.1:8001,", "''"),
        ("http://triton:8001", "'http://triton:8001'"),
        ("[::zz]:8001", "HOST:PORT"),
        ("[1:2]:8001", "1:2"),
        ("a:8001,b:8001", "one name"),
        ("10.0.0.1:8001,[::1]:8001", "all IPv4 or all IPv6"),
    ],
)
def test_an_unusable_address_is_told(servers: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        grpc_target(servers)


def test_an_unusable_address_or_a_missing_package_ends_serve_with_one_line() -> None:
    done = run_alexnet("serve", "--port", "0", "--triton", "nonsense")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "triton: " in line and "'nonsense' is no HOST:PORT" in line

    code = (
        "import sys, alexnet; sys.modules['tritonclient'] = None; "
        "sys.argv = ['alexnet', 'serve', '--port', '0', '--triton', '127.0.0.1:8001']; alexnet.main()"
    )
    without = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=QUIET,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    (line,) = without.stderr.splitlines()
    assert without.returncode == 1 and "tritonclient" in line and "pip install '.[triton]'" in line


def test_serve_without_its_triton_starts_says_so_and_ends_on_sigterm() -> None:
    with fake_triton() as server:
        server.stop()
        process = subprocess.Popen(
            [*ALEXNET, "serve", "--port", "0", "--triton", server.address],
            cwd=ROOT, env=QUIET | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "not ready: no Triton server can be reached" in line
            url = line.split(" on ")[1].split(",")[0]
            assert httpx.get(f"{url}/readyz").status_code == 503
            server.start()
            limit = time.monotonic() + 10
            while httpx.get(f"{url}/readyz").status_code != 200:
                assert time.monotonic() < limit
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
        finally:
            process.kill()
            process.communicate()


# --- answers ---------------------------------------------------------------------------------------


def test_answers_and_everything_known_of_the_model_come_from_triton() -> None:
    async def test() -> None:
        with fake_triton(precision="int8") as server:
            async with connected(server.address) as backend:
                assert backend.concurrency == 8
                assert backend.model.labels == LABELS
                info = backend.model.info
                assert (info.name, info.version, info.precision) == ("alexnet", "7", "int8")
                assert info.backend == "triton"
                for count in (1, 2, 10, 64):  # 64 crops: 9.6 MB, over gRPC's own limit of 4 MiB
                    crops = random_crops(count, seed=count)
                    answer = await backend.infer(crops)
                    expected = server.engines["7"].probabilities(crops)
                    np.testing.assert_array_equal(answer.probabilities, expected)
                    assert answer.model is backend.model
        with pytest.raises(ModelNotReady, match="closing"):
            _ = backend.model

    run(test())


def test_labels_keep_colons_and_names_without_wordnet_ids() -> None:
    lines = ["n01440764 tench: a fish", "12:30", *(f"class {index}" for index in range(8))]

    async def test() -> None:
        with fake_triton(label_lines=lines, precision="") as server:
            async with connected(server.address) as backend:
                assert [label.line() for label in backend.model.labels] == lines
                assert backend.model.labels[0].wnid == "n01440764"
                assert backend.model.info.precision == "unknown"

    run(test())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "resnet"}, ["no model 'alexnet'"]),
        ({"input": ("data", "FP32", [-1, 3, 224, 224])}, ["data FP32 [-1, 3, 224, 224]", "images UINT8"]),
        ({"input": ("images", "UINT8", [-1, 299, 299, 3])}, ["299"]),
        ({"labels": LABELS[:1]}, ["probabilities FP32 [-1, 1]"]),
        ({"label_lines": [label.line() for label in LABELS[:9]]}, ["10 outputs", "labels of 9"]),
        ({"label_lines": []}, ["labels of 0", "label_filename"]),
        ({"max_batch": 8}, ["batches of 8", "10"]),
    ],
    ids=["name", "input", "size", "outputs", "fewer labels", "no labels", "small batches"],
)
def test_a_model_that_cannot_be_served_is_told_and_recovers_when_it_is_put_right(
    changes: dict[str, Any], words: list[str]
) -> None:
    async def test() -> None:
        with fake_triton(**changes) as server:
            async with connected(server.address) as backend:
                with pytest.raises(ModelNotReady) as caught:
                    _ = backend.model
                for word in words:
                    assert word in str(caught.value)
                right = FakeTriton()
                for name in changes:
                    setattr(server, name, getattr(right, name))
                await until(lambda: is_ready(backend))
                assert backend.model.labels == LABELS

    run(test())


def test_an_answer_names_the_version_that_gave_it_while_the_model_is_reloaded() -> None:
    async def test() -> None:
        with fake_triton() as server:
            async with connected(server.address) as backend:
                crops = random_crops(10)
                old = server.engines["7"].probabilities(crops)
                entered, go_on = threading.Event(), threading.Event()

                def wait(_: object) -> None:
                    entered.set()
                    go_on.wait(20)

                server.before = wait
                under_way = asyncio.create_task(backend.infer(crops))
                await asyncio.to_thread(entered.wait, 20)
                server.before = lambda _: None
                server.load("8", seed=8)
                at_once = await backend.infer(crops)  # before the gateway has looked again
                await until(lambda: backend.model.info.version == "8")
                go_on.set()
                late = await under_way
                assert (at_once.model.info.version, late.model.info.version) == ("8", "7")
                np.testing.assert_array_equal(late.probabilities, old)
                np.testing.assert_array_equal(
                    at_once.probabilities, server.engines["8"].probabilities(crops)
                )
                server.versions, server.version = ["7"], "7"  # rolled back
                await until(lambda: backend.model.info.version == "7")

    run(test())


def test_a_version_that_is_listed_but_does_not_answer_is_not_the_one_served() -> None:
    async def test() -> None:
        with fake_triton(versions=["7", "9"]) as server:
            async with connected(server.address) as backend:
                assert backend.model.info.version == "7"

    run(test())


def test_a_version_brings_its_own_labels() -> None:
    async def test() -> None:
        with fake_triton() as server:
            async with connected(server.address) as backend:
                server.labels = tuple(Label(f"class {index}", f"class {index}") for index in range(3))
                server.label_lines = [label.line() for label in server.labels]
                server.load("8", seed=8)
                answer = await backend.infer(random_crops(2))
                assert answer.probabilities.shape == (2, 3)
                assert answer.model.labels == server.labels

    run(test())


# --- faults ----------------------------------------------------------------------------------------


def test_a_full_queue_is_told_at_once_and_not_asked_again() -> None:
    asked: list[None] = []

    def full(context: grpc.ServicerContext) -> None:
        asked.append(None)
        full_queue(context)

    async def test() -> None:
        with fake_triton(before=full) as server:
            async with connected(server.address) as backend:
                with pytest.raises(Overloaded):
                    await backend.infer(random_crops(1))
                assert len(asked) == 1
                assert is_ready(backend)

    run(test())


@pytest.mark.parametrize("failures", [2, 100])
def test_an_inference_that_never_ran_is_tried_again_a_few_times(failures: int) -> None:
    asked: list[None] = []

    def unavailable(context: grpc.ServicerContext) -> None:
        asked.append(None)
        if len(asked) <= failures:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    async def test() -> None:
        with fake_triton(before=unavailable) as server:
            async with connected(server.address) as backend:
                if failures == 2:
                    await backend.infer(random_crops(1))
                    assert len(asked) == 3
                else:
                    with pytest.raises(ModelNotReady, match="reached"):
                        await backend.infer(random_crops(1))
                    assert len(asked) == 5

    run(test())


def abort(code: grpc.StatusCode, text: str) -> Callable[[grpc.ServicerContext], None]:
    return lambda context: context.abort(code, text)


@pytest.mark.parametrize(
    ("before", "kind"),
    [
        (abort(grpc.StatusCode.UNAVAILABLE, "Request timeout expired"), DeadlineExceeded),
        (abort(grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'alexnet'"), ModelNotReady),
        (abort(grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape for input 'images'"), EngineFailed),
        (abort(grpc.StatusCode.INTERNAL, "onnx runtime error 6 at 10.1.2.3:8001"), EngineFailed),
        (abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!"), EngineFailed),
    ],
    ids=["queue timeout", "unloaded", "invalid", "internal", "no Triton"],
)
def test_each_of_triton_s_errors_has_its_own_of_ours_without_addresses(
    before: Callable[[grpc.ServicerContext], None], kind: type[ServingError]
) -> None:
    async def test() -> None:
        with fake_triton(before=before) as server:
            async with connected(server.address) as backend:
                with pytest.raises(kind) as caught:
                    await backend.infer(random_crops(1))
                assert "10.1.2.3" not in str(caught.value)

    run(test())


def numbers(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], None]:
    """A corruption of the answer's numbers that leaves its declared shape."""

    def corrupt(response: Any) -> None:
        values = np.frombuffer(response.raw_output_contents[0], np.float32)
        response.raw_output_contents[0] = change(values.copy()).astype(np.float32).tobytes()

    return corrupt


def another_shape(response: Any) -> None:
    response.outputs[0].shape[:] = [5, 4]


def another_name(response: Any) -> None:
    response.outputs[0].name = "logits"


def no_output(response: Any) -> None:
    del response.outputs[:], response.raw_output_contents[:]


@pytest.mark.parametrize(
    "corrupt",
    [
        numbers(lambda values: values[:0]),  # NumPy 2 under a backend built for 1
        numbers(lambda values: values[:-1]),
        numbers(lambda values: np.where(np.arange(len(values)) == 7, np.nan, values)),
        numbers(lambda values: np.where(np.arange(len(values)) == 7, np.inf, values)),
        numbers(np.log),  # logits: the softmax was left out
        numbers(lambda values: values + np.tile([0.5, -0.5], len(values) // 2)),
        numbers(np.zeros_like),
        another_shape,
        another_name,
        no_output,
    ],
    ids=["empty", "short", "NaN", "inf", "logits", "negative", "zeros", "shape", "name", "none"],
)
def test_an_answer_that_is_no_softmax_of_each_crop_is_an_error(corrupt: Callable[[Any], None]) -> None:
    async def test() -> None:
        with fake_triton(corrupt=corrupt) as server:
            async with connected(server.address) as backend:
                with pytest.raises(EngineFailed, match="model server"):
                    await backend.infer(random_crops(2))
                assert is_ready(backend)
            server.looks_too = True
            async with connected(server.address) as backend:
                with pytest.raises(ModelNotReady, match="the model server"):
                    _ = backend.model

    run(test())


def test_the_deadline_reaches_the_server_and_ends_the_call() -> None:
    release = threading.Event()

    async def test() -> None:
        with fake_triton(before=lambda _: release.wait(20)) as server:
            async with connected(server.address) as backend:
                with pytest.raises(DeadlineExceeded):
                    await backend.infer(random_crops(1), asyncio.get_running_loop().time() + 0.3)
                assert await asyncio.to_thread(server.ended_early.acquire, timeout=10)
                (left_s,) = server.deadlines
                assert left_s is not None and left_s <= 0.31
                release.set()

    run(test())


def test_a_cancelled_inference_is_cancelled_at_the_server() -> None:
    entered, release = threading.Event(), threading.Event()

    def wait(_: object) -> None:
        entered.set()
        release.wait(20)

    async def test() -> None:
        with fake_triton(before=wait) as server:
            async with connected(server.address) as backend:
                inference = asyncio.create_task(backend.infer(random_crops(1)))
                await asyncio.to_thread(entered.wait, 20)
                inference.cancel()
                assert await asyncio.to_thread(server.ended_early.acquire, timeout=10)
                release.set()

    run(test())


def test_a_server_that_comes_late_goes_away_and_returns_is_followed() -> None:
    async def test() -> None:
        with fake_triton() as server:
            server.stop()
            async with connected(server.address) as backend:
                with pytest.raises(ModelNotReady, match="no Triton server can be reached"):
                    _ = backend.model
                for _ in range(2):
                    server.start()
                    await until(lambda: is_ready(backend))
                    await backend.infer(random_crops(1))
                    server.stop()
                    with pytest.raises(ModelNotReady):
                        await backend.infer(random_crops(1))
                    await until(lambda: not is_ready(backend))

    run(test())


def test_requests_go_to_every_server_and_only_to_those_that_are_there() -> None:
    async def test() -> None:
        with fake_triton() as first, fake_triton() as second:
            async with connected(f"{first.address},{second.address}") as backend:
                both = (first, second)
                # The first look waits for one connection, not for both.
                async with asyncio.timeout(20):
                    while not all(server.batches for server in both):
                        await backend.infer(random_crops(1))
                first.stop()
                served = len(second.batches)
                for _ in range(10):
                    await backend.infer(random_crops(1))
                assert len(second.batches) == served + 10

    run(test())


# --- servers killed and stopped ---------------------------------------------------------------------


Server = FakeTritonProcess | LocalTriton
Servers = Callable[[str], Server]
Step = tuple[Callable[[], None], str]


@pytest.fixture(params=["fake", "real"])
def server_of(request: pytest.FixtureRequest, tmp_path: Path) -> Servers:
    """Makes a server, in a process of its own, whose model has the version given."""
    if request.param == "fake":
        return FakeTritonProcess
    request.getfixturevalue("triton_installed")
    return lambda version: LocalTriton(triton_repository(tmp_path / version, version=int(version)))


async def failures_under_load(first: Server, second: Server, steps: Iterable[Step]) -> list[ServingError]:
    """Four clients all the while: a step is done, then awaited are 20 answers of each version it names.

    The two servers have different versions, so that an answer tells whose it is.
    """
    failures: list[ServingError] = []
    by_version: Counter[str] = Counter()
    stop = asyncio.Event()

    async def client(seed: int) -> None:
        while not stop.is_set():
            try:
                answer = await backend.infer(random_crops(2, seed))
                by_version[answer.model.info.version] += 1
            except ServingError as error:
                failures.append(error)

    def answered(versions: str) -> bool:
        return all(by_version[version] >= 20 for version in versions)

    async with connected(f"{first.grpc},{second.grpc}") as backend:
        clients = [asyncio.create_task(client(seed)) for seed in range(4)]
        for step, versions in steps:
            await asyncio.to_thread(step)
            by_version.clear()
            await until(partial(answered, versions), 30)
        stop.set()
        await asyncio.gather(*clients)
    return failures


def test_one_of_two_servers_killed_under_load_and_started_again_fails_no_request(server_of: Servers) -> None:
    async def test() -> None:
        steps: list[Step] = [(lambda: None, "78"), (first.kill, "8"), (first.start, "78")]
        assert await failures_under_load(first, second, steps) == []

    with server_of("7") as first, server_of("8") as second:
        run(test())


def test_one_of_two_servers_stopped_under_load_for_a_while_fails_no_request() -> None:
    async def test() -> None:
        halt, go_on = partial(stop, first.pid), partial(os.kill, first.pid, signal.SIGCONT)
        steps: list[Step] = [(lambda: None, "78"), (halt, "8"), (go_on, "78")]
        assert await failures_under_load(first, second, steps) == []

    with FakeTritonProcess("7") as first, FakeTritonProcess("8") as second:
        run(test())


def test_a_stopped_server_is_noticed_and_used_again_soon_after_it_goes_on(server_of: Servers) -> None:
    async def test(server: Server) -> None:
        async with connected(server.grpc) as backend:
            await backend.infer(random_crops(10))
            stop(server.pid)
            deadline_s = asyncio.get_running_loop().time() + 0.2
            with pytest.raises(DeadlineExceeded):
                await backend.infer(random_crops(1), deadline_s)
            with pytest.raises(ModelNotReady):  # the ping that was not answered
                await backend.infer(random_crops(10))
            await until(lambda: not is_ready(backend))
            os.kill(server.pid, signal.SIGCONT)
            continued = time.monotonic()
            await until(lambda: is_ready(backend))
            assert time.monotonic() - continued < 2
            await backend.infer(random_crops(10))

    with server_of("7") as server:
        run(test(server))


# --- a real Triton -----------------------------------------------------------------------------------


def test_triton_and_the_embedded_engine_answer_alike(triton: LocalTriton) -> None:
    async def test() -> None:
        embedded = OnnxRuntimeBackend(triton.repository, "alexnet", threads=1)
        await embedded.start()
        async with connected(triton.grpc) as remote:
            assert remote.model.labels == embedded.model.labels
            assert remote.model.info.version == embedded.model.info.version
            for seed in range(6):
                for crops in (Crops.CENTER, Crops.TEN):
                    cut = prepare(encoded(picture(seed)), crops)
                    here, there = await embedded.infer(cut), await remote.infer(cut)
                    np.testing.assert_allclose(there.probabilities, here.probabilities, rtol=0, atol=1e-6)
        async with connected(triton.grpc, "resnet") as other:
            with pytest.raises(ModelNotReady, match="no model 'resnet'"):
                _ = other.model
        await embedded.close()

    run(test())


def test_a_real_reload_a_real_full_queue_and_a_real_contract_break(
    triton_installed: None, tmp_path: Path
) -> None:
    repository = triton_repository(tmp_path / "repository")
    config = repository / "alexnet" / "config.pbtxt"
    short = re.sub(r"max_queue_size: \d+", "max_queue_size: 1", config.read_text())
    assert short != config.read_text()
    config.write_text(short)

    async def test(server: LocalTriton) -> None:
        async with connected(server.grpc) as backend:
            crops = random_crops(2)
            old = await backend.infer(crops)
            many = random_crops(64)
            kinds: set[type] = set()
            for _ in range(20):  # until the server is slower than the sending
                asked = [backend.infer(many) for _ in range(24)]
                kinds |= {type(answer) for answer in await asyncio.gather(*asked, return_exceptions=True)}
                if Overloaded in kinds:
                    break
            assert kinds == {Inference, Overloaded}

            published = triton_repository(tmp_path / "next", version=2, seed=5) / "alexnet" / "2"
            published.rename(repository / "alexnet" / "2")
            await asyncio.to_thread(load_model, server.http, "alexnet")
            new = await backend.infer(crops)
            assert (old.model.info.version, new.model.info.version) == ("1", "2")
            assert np.abs(new.probabilities - old.probabilities).max() > 0.01
            await until(lambda: backend.model.info.version == "2")

            fewer = (repository / "alexnet" / "labels.txt").read_text().splitlines()[:7]
            (repository / "alexnet" / "labels.txt").write_text("\n".join(fewer) + "\n")
            await asyncio.to_thread(load_model, server.http, "alexnet")
        async with connected(server.grpc) as backend:
            with pytest.raises(ModelNotReady, match="10 outputs, but Triton knows the labels of 7"):
                _ = backend.model

    with LocalTriton(repository) as server:
        run(test(server))


# --- over HTTP -------------------------------------------------------------------------------------


def classify(url: str, data: bytes, **params: str) -> httpx.Response:
    return httpx.post(f"{url}/classify", files={"file": data}, params=params, timeout=30)


def assert_problem(response: httpx.Response, status: int, words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert words in response.json()["detail"]


def test_the_gateway_answers_as_over_its_embedded_engine(serve: Serve) -> None:
    data = encoded(picture(1))
    with fake_triton() as server, serve(backend_of(server.address)) as url:
        for crops in ("center", "ten"):
            body = classify(url, data, crops=crops, top="10").json()
            expected = server.engines["7"].probabilities(prepare(data, Crops(crops))).mean(axis=0)
            said = {p["index"]: p["probability"] for p in body["predictions"]}
            np.testing.assert_allclose([said[i] for i in range(10)], expected, rtol=1e-5)
            assert body["model"]["backend"] == "triton"
        assert httpx.get(f"{url}/labels").json()[8]["label"] == "golf ball"
        assert httpx.get(f"{url}/model").json()["provenance"] is None
        left_s, whole_s = server.deadlines[-1], Settings().request_timeout_s
        assert left_s is not None and whole_s - 20 < left_s <= whole_s


def test_a_gateway_without_its_triton_lives_says_why_and_recovers(serve: Serve) -> None:
    data = encoded(picture(2))
    with fake_triton() as server:
        server.stop()
        with serve(backend_of(server.address)) as url:
            assert httpx.get(f"{url}/livez").status_code == 200
            for response in (httpx.get(f"{url}/readyz"), classify(url, data), httpx.get(f"{url}/labels")):
                assert_problem(response, 503, "no Triton server can be reached")
                assert int(response.headers["retry-after"]) >= 1
                assert server.address not in response.text
            server.start()
            limit = time.monotonic() + 10
            while httpx.get(f"{url}/readyz").status_code != 200:
                assert time.monotonic() < limit
                time.sleep(0.02)
            assert classify(url, data).status_code == 200
            server.before = full_queue
            refused = classify(url, data)
            assert_problem(refused, 503, "queue is full")
            assert int(refused.headers["retry-after"]) >= 1
            server.before = abort(grpc.StatusCode.INTERNAL, "no")
            assert_problem(classify(url, data), 502, "model server failed")
            assert httpx.get(f"{url}/readyz").status_code == 200


def test_a_triton_that_does_not_answer_in_time_is_504(serve: Serve) -> None:
    release = threading.Event()
    with (
        fake_triton(before=lambda _: release.wait(20)) as server,
        serve(backend_of(server.address), request_timeout_s=0.5) as url,
    ):
        assert_problem(classify(url, encoded(picture(3))), 504, "")
        assert server.ended_early.acquire(timeout=10)
        release.set()


def test_a_client_that_leaves_takes_its_inference_with_it(serve: Serve) -> None:
    entered, release = threading.Event(), threading.Event()

    def wait(_: object) -> None:
        entered.set()
        release.wait(20)

    with fake_triton(before=wait) as server, serve(backend_of(server.address)) as url:
        address = urlsplit(url)
        assert address.hostname and address.port
        leaver = http.client.HTTPConnection(address.hostname, address.port)
        leaver.request("POST", "/classify", encoded(picture(4)), {"content-type": "image/jpeg"})
        assert entered.wait(20)
        assert "alexnet_waiting_crops 10.0" in httpx.get(f"{url}/metrics").text
        leaver.close()
        assert server.ended_early.acquire(timeout=10)
        limit = time.monotonic() + 10
        counted = 'alexnet_refusals_total{reason="client_left",status="499"} 1.0'
        while counted not in httpx.get(f"{url}/metrics").text:
            assert time.monotonic() < limit
            time.sleep(0.02)
        assert "alexnet_waiting_crops 0.0" in httpx.get(f"{url}/metrics").text
        release.set()
