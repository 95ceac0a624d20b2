"""A real tritonserver on the repository: the same answers, versions followed, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc
from support import ALEXNET, LABELS, QUIET, ROOT, run_alexnet, tiny_repository, triton_repository

from serving.contract import INPUT_NAME, OUTPUT_NAME
from serving.errors import MalformedRequest, ModelNotReady
from serving.postprocess import Probabilities
from serving.preprocess import Pixels
from serving.triton import LocalTriton, ask, load_model, servable_models, sweep

SHARED_MEMORY = Path("/dev/shm")


def random_crops(count: int, seed: int) -> Pixels:
    rng = np.random.default_rng(seed)
    return rng.integers(0, rng.integers(50, 256, (count, 1, 1, 3)), (count, 224, 224, 3), np.uint8)


def infer(address: str, crops: Pixels, version: str = "", **options: int) -> np.ndarray:
    with tritonclient.grpc.InferenceServerClient(address) as client:
        tensor = tritonclient.grpc.InferInput(INPUT_NAME, list(crops.shape), "UINT8")
        tensor.set_data_from_numpy(crops)
        wanted = [tritonclient.grpc.InferRequestedOutput(OUTPUT_NAME, **options)]
        result = client.infer("alexnet", [tensor], outputs=wanted, model_version=version)
        answer: np.ndarray = result.as_numpy(OUTPUT_NAME)
        return answer


def in_process(repository: Path, crops: Pixels, version: int = 1) -> Probabilities:
    session = onnxruntime.InferenceSession(str(repository / "alexnet" / str(version) / "model.onnx"))
    answer: Probabilities = session.run([OUTPUT_NAME], {INPUT_NAME: crops})[0]
    return answer


@pytest.mark.parametrize("count", [1, 2, 10, 64])
def test_triton_answers_as_onnx_runtime_in_process(triton: LocalTriton, count: int) -> None:
    crops = random_crops(count, seed=count)
    np.testing.assert_allclose(infer(triton.grpc, crops), in_process(triton.repository, crops), atol=1e-6)


def test_clients_at_once_share_executions_and_get_their_own_answers(triton: LocalTriton) -> None:
    batches = [random_crops(1 + seed % 3, seed) for seed in range(24)]
    before = executions(triton)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda crops: infer(triton.grpc, crops), batches))
    assert executions(triton) - before < len(batches), "no two requests shared an execution"
    for crops, answer in zip(batches, answers, strict=True):
        np.testing.assert_allclose(answer, in_process(triton.repository, crops), atol=1e-6)


def executions(triton: LocalTriton) -> int:
    statistics = ask(triton.http, "v2/models/alexnet/stats")
    return sum(entry["execution_count"] for entry in statistics["model_stats"])


def test_classification_gives_the_labels_of_the_repository(triton: LocalTriton) -> None:
    crops = random_crops(2, seed=9)
    rows = infer(triton.grpc, crops, class_count=3)
    for row, probabilities in zip(rows, in_process(triton.repository, crops), strict=True):
        top = np.argsort(-probabilities)[:3]
        said = [entry.decode().split(":", 2) for entry in row]
        assert [int(index) for _, index, _ in said] == top.tolist()
        assert [label for *_, label in said] == [LABELS[index].line() for index in top]
        assert [float(p) for p, *_ in said] == pytest.approx(probabilities[top], abs=1e-5)


def test_what_triton_s_image_client_asks_of_a_model_is_answered(triton: LocalTriton) -> None:
    """Its `parse_model`: one input of three dimensions with a format, one FP32 output that is a vector."""
    metadata = ask(triton.http, "v2/models/alexnet")
    config = ask(triton.http, "v2/models/alexnet/config")
    (tensor,), (output,) = metadata["inputs"], metadata["outputs"]
    assert (tensor["datatype"], tensor["shape"]) == ("UINT8", [-1, 224, 224, 3])
    assert (output["datatype"], output["shape"]) == ("FP32", [-1, len(LABELS)])
    assert config["input"][0]["format"] == "FORMAT_NHWC" and config["max_batch_size"] > 0


def test_a_request_against_the_contract_is_told_what_is_wrong(triton: LocalTriton) -> None:
    with pytest.raises(tritonclient.grpc.InferenceServerException, match="shape"):
        infer(triton.grpc, random_crops(1, 1)[:, :100])
    assert infer(triton.grpc, random_crops(1, 1)).shape == (1, 10)


@contextmanager
def following(repository: Path, every_s: float = 0.05) -> Iterator[LocalTriton]:
    stopped = threading.Event()
    with LocalTriton(repository) as server:
        thread = threading.Thread(target=server.follow, args=(every_s, stopped))
        thread.start()
        try:
            yield server
        finally:
            stopped.set()
            thread.join()


def publish(root: Path, repository: Path, version: int) -> None:
    aside = tiny_repository(root / f"aside-{version}", version=version, seed=version)
    (aside / "alexnet" / str(version)).rename(repository / "alexnet" / str(version))


def until_ready(server: LocalTriton, version: int) -> None:
    until = time.monotonic() + 30
    while {"READY"} != {e["state"] for e in server.index() if e["version"] == str(version)}:
        assert time.monotonic() < until, server.index()
        time.sleep(0.05)


def test_a_published_version_is_followed_without_a_lost_request_and_a_broken_one_refused(
    triton_installed: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repository = triton_repository(tmp_path / "repository")
    crops = random_crops(2, 3)
    stop = threading.Event()
    answers: list[np.ndarray] = []

    def client(address: str) -> None:
        while not stop.is_set():
            answers.append(infer(address, crops))

    with following(repository) as server, ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(client, server.grpc) for _ in range(3)]
        try:
            for version in (2, 3):
                publish(tmp_path, repository, version)
                until_ready(server, version)
            assert not any(client.done() for client in clients)
            broken = tmp_path / "broken"
            broken.mkdir()
            (broken / "model.onnx").write_bytes(b"no model")
            broken.rename(repository / "alexnet" / "4")
            until = time.monotonic() + 20
            while not any("goes on being served" in r.getMessage() for r in caplog.records):
                assert time.monotonic() < until
                time.sleep(0.05)
        finally:
            stop.set()
        for each in clients:
            each.result()
        np.testing.assert_allclose(infer(server.grpc, crops), in_process(repository, crops, 3), atol=1e-6)
    expected = [in_process(repository, crops, version) for version in (1, 2, 3)]
    for answer in answers:
        assert min(np.abs(answer - each).max() for each in expected) < 1e-6


def test_the_server_itself_refuses_a_version_that_cannot_be_loaded(
    triton_installed: None, tmp_path: Path
) -> None:
    repository = triton_repository(tmp_path)
    with LocalTriton(repository) as server:
        (repository / "alexnet" / "2").mkdir()
        (repository / "alexnet" / "2" / "model.onnx").write_bytes(b"no model")
        with pytest.raises(ModelNotReady, match="alexnet"):
            load_model(server.http, "alexnet")
        assert infer(server.grpc, random_crops(1, 1), version="1").shape == (1, 10)
        with pytest.raises(ModelNotReady, match="nothing"):
            load_model(server.http, "nothing")


def test_what_cannot_be_started_is_told(triton_installed: None, tmp_path: Path) -> None:
    with pytest.raises(ModelNotReady, match="no model for Triton"):
        servable_models(tmp_path)
    repository = triton_repository(tmp_path)
    with pytest.raises(ModelNotReady, match="Triton cannot load nothing"):
        LocalTriton(repository, ["nothing"]).start()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MalformedRequest, match=f"port {port} .* in use; name another"):
            LocalTriton(repository, grpc_port=port).start()
    (repository / "alexnet" / "1" / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ModelNotReady, match="Triton cannot load alexnet: "):
        LocalTriton(repository).start()
    assert not list(SHARED_MEMORY.glob(f"alexnet-triton-{os.getpid()}-*{tmp_path.name}*"))


def backends_of(repository: Path) -> list[str]:
    """Command lines of the processes that hold the repository's models for a server."""
    lines = []
    for path in Path("/proc").glob("[1-9]*/cmdline"):
        with contextlib.suppress(OSError):  # gone meanwhile
            lines.append(path.read_text())
    return [line for line in lines if "triton_python_backend_stub" in line and str(repository) in line]


def test_a_crashed_server_s_backends_do_not_outlive_it(triton_installed: None, tmp_path: Path) -> None:
    server = LocalTriton(triton_repository(tmp_path))
    server.start()
    assert backends_of(tmp_path)
    server.kill()
    server.stop()
    until = time.monotonic() + 10
    while backends_of(tmp_path):
        assert time.monotonic() < until
        time.sleep(0.05)


def start_command(repository: Path, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [*ALEXNET, "triton", "--repository", str(repository), *arguments],
        cwd=ROOT,
        env=QUIET,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline()


ANY_PORT = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")


def regions(process: subprocess.Popen[str]) -> list[Path]:
    return list(SHARED_MEMORY.glob(f"alexnet-triton-{process.pid}-*"))


def test_the_command_says_where_it_listens_and_ends_cleanly(triton_installed: None, tmp_path: Path) -> None:
    log = tmp_path / "triton.log"
    process, line = start_command(triton_repository(tmp_path / "r"), *ANY_PORT, "--log", str(log))
    assert line.startswith("Triton: alexnet version 1 ready on grpc://127.0.0.1:")
    address = line.split("grpc://")[1].split()[0]
    assert infer(address, random_crops(1, 1)).shape == (1, 10)
    assert regions(process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")
    assert "Started GRPCInferenceService" in log.read_text()
    assert not regions(process)


def test_a_killed_command_takes_its_server_along_and_its_leavings_are_swept(
    triton_installed: None, tmp_path: Path
) -> None:
    process, line = start_command(triton_repository(tmp_path), *ANY_PORT)
    address = line.split("http://")[1].split(",")[0]
    process.kill()
    process.communicate(timeout=10)
    until = time.monotonic() + 20
    while True:
        try:
            ask(address, "v2/health/live", timeout_s=1)
        except ModelNotReady:
            break
        assert time.monotonic() < until, "the server outlives its parent"
        time.sleep(0.1)
    (SHARED_MEMORY / f"alexnet-triton-{process.pid}-left-behind").touch()
    folder = Path(tempfile.gettempdir()) / f"alexnet-triton-{process.pid}-left-behind"
    folder.mkdir()
    sweep()
    assert not regions(process) and not folder.exists()


def test_a_server_that_dies_ends_the_command_with_its_last_words(
    triton_installed: None, tmp_path: Path
) -> None:
    process, _ = start_command(triton_repository(tmp_path), *ANY_PORT, "--watch-s", "0.1")
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "tritonserver ended with status -9; the last it said:" in err


def test_a_missing_repository_ends_the_command_with_one_line(tmp_path: Path) -> None:
    done = run_alexnet("triton", "--repository", tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no model for Triton's onnxruntime backend; make one with: alexnet export" in done.stderr
