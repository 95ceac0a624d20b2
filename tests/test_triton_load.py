"""A published version handed to Triton servers that run: loaded, asked its golden images, nothing lost."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import tritonclient.grpc
from support import LABELS, run_alexnet, tiny_repository

from export.config import config_text
from export.gate import onnx_predictor
from export.golden import golden_images
from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint
from model.net import AlexNet, Architecture, initialise_kaiming
from serving.contract import INPUT_NAME, OUTPUT_NAME
from serving.errors import EngineFailed, ModelNotReady
from serving.preprocess import Pixels
from serving.triton import LocalTriton
from serving.triton_load import load_everywhere, load_version
from serving.triton_target import addresses, each_server

RELOADS = 3


def publish(repository: Path, model: str, version: int, *, answers_as: int | None = None) -> Path:
    """Made aside and renamed, as `export.publish` does; the weights are the version's number's.

    `answers_as`: its golden images say what that version would have answered.
    """
    aside = repository.parent / f"aside-{model}-{version}"
    folder = tiny_repository(aside / "own", name=model, version=version, seed=version) / model
    seed = version if answers_as is None else answers_as
    other = tiny_repository(aside / "other", seed=seed) / "alexnet" / "1"
    golden_images(onnx_predictor(other / "model.onnx"), 1e-5).write(folder / str(version))
    target = repository / model
    if not target.exists():
        target.mkdir(parents=True)
        (folder / "labels.txt").rename(target / "labels.txt")
        (target / "config.pbtxt").write_text(config_text(model, len(LABELS)))
    return (folder / str(version)).rename(target / str(version))


@pytest.fixture(scope="module")
def server(triton_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    """A server that follows nothing by itself; each test publishes a model of its own."""
    repository = tmp_path_factory.mktemp("load") / "repository"
    publish(repository, "alexnet", 1)
    with LocalTriton(repository) as server:
        yield server


def closed_port() -> str:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def crops_of(seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (2, 224, 224, 3), np.uint8)


def in_process(version: Path, crops: Pixels) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(version / "model.onnx"))
    answer: np.ndarray = session.run([OUTPUT_NAME], {INPUT_NAME: crops})[0]
    return answer


def ready(server: LocalTriton, model: str) -> list[str]:
    return [e["version"] for e in server.index() if e["name"] == model and e.get("state") == "READY"]


def test_versions_are_loaded_one_after_the_other_without_a_lost_request(server: LocalTriton) -> None:
    first = publish(server.repository, "busy", 1)
    asyncio.run(load_version(server.grpc, first))
    crops, stop = crops_of(3), threading.Event()
    answered: list[list[tuple[str, np.ndarray]]] = [[], [], []]

    def client(answers: list[tuple[str, np.ndarray]]) -> None:
        with tritonclient.grpc.InferenceServerClient(server.grpc) as triton:
            tensor = tritonclient.grpc.InferInput(INPUT_NAME, list(crops.shape), "UINT8")
            tensor.set_data_from_numpy(crops)
            while not stop.is_set():
                result = triton.infer("busy", [tensor])  # raises where a request is lost
                answers.append((result.get_response().model_version, result.as_numpy(OUTPUT_NAME)))

    def until_each_client_met(number: str, running: list[Future[None]]) -> None:
        until = time.monotonic() + 20
        while not all(answers and answers[-1][0] == number for answers in answered):
            assert time.monotonic() < until
            assert not any(each.done() for each in running), "a request was lost"
            time.sleep(0.01)

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(client, answers) for answers in answered]
        try:
            until_each_client_met("1", clients)
            for number in range(2, 2 + RELOADS):
                version = publish(server.repository, "busy", number)
                assert asyncio.run(load_everywhere([server.grpc], version)) == []
                until_each_client_met(str(number), clients)
        finally:
            stop.set()
        for each in clients:
            each.result()
    expected = {
        str(number): in_process(server.repository / "busy" / str(number), crops)
        for number in range(1, 2 + RELOADS)
    }
    for answers in answered:
        numbers = [int(number) for number, _ in answers]
        assert numbers == sorted(numbers), "no answer of an older version after one of a newer"
        for each_number, probabilities in answers:
            np.testing.assert_allclose(probabilities, expected[each_number], atol=1e-6)


def test_a_server_that_is_away_does_not_keep_the_version_from_the_others(server: LocalTriton) -> None:
    version, away = publish(server.repository, "reached", 1), closed_port()
    faults = asyncio.run(load_everywhere([away, "no-such-host.invalid:8001", server.grpc], version))
    assert ready(server, "reached") == ["1"]
    unknown, refused = sorted(faults, key=lambda fault: away in fault)
    assert unknown.startswith("Triton on no-such-host.invalid:8001: ")
    assert refused.startswith(f"Triton on {away}: ")
    assert "Connection refused" in refused


def test_a_version_that_cannot_be_loaded_is_refused_and_the_old_one_serves_on(server: LocalTriton) -> None:
    asyncio.run(load_version(server.grpc, publish(server.repository, "damaged", 1)))
    broken = publish(server.repository, "damaged", 2)
    (broken / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ModelNotReady, match=r"load failed for model 'damaged': version 2 .*InvalidProtobuf"):
        asyncio.run(load_version(server.grpc, broken))
    assert "1" in ready(server, "damaged")


def test_a_version_that_answers_otherwise_is_told_and_no_further_server_gets_it(server: LocalTriton) -> None:
    version = publish(server.repository, "otherwise", 1, answers_as=7)
    with pytest.raises(EngineFailed, match=r"version 1 answers otherwise there \(golden image"):
        asyncio.run(load_version(server.grpc, version))
    away = closed_port()
    (fault,) = asyncio.run(load_everywhere([server.grpc, away], version))
    assert fault.endswith(f"; not told to load it: {away}")


def test_a_server_over_another_repository_is_noticed(server: LocalTriton, tmp_path: Path) -> None:
    publish(server.repository, "elsewhere", 1)
    publish(tmp_path / "r", "elsewhere", 1)
    version = publish(tmp_path / "r", "elsewhere", 2)
    with pytest.raises(ModelNotReady, match=r"version 1 answers there; is it the same repository\?"):
        asyncio.run(load_version(server.grpc, version))


def test_a_server_that_restricts_loading_wants_the_key(triton_installed: None, tmp_path: Path) -> None:
    version = publish(tmp_path / "r", "alexnet", 1)
    restricted = "--grpc-restricted-protocol=model-repository:admin-key=secret"
    with LocalTriton(tmp_path / "r", arguments=[restricted]) as server:
        with pytest.raises(ModelNotReady, match=r"restricted|admin-key"):
            asyncio.run(load_version(server.grpc, version))
        asyncio.run(load_version(server.grpc, version, "secret"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    net = AlexNet(Architecture("2012", len(LABELS), low_rank=16)).eval()
    initialise_kaiming(net)
    path = tmp_path_factory.mktemp("checkpoint") / "net.safetensors"
    checkpoints.save(path, Checkpoint(net, list(LABELS)))
    return path


def test_export_hands_its_version_over_and_rollback_the_one_before(
    server: LocalTriton, checkpoint: Path
) -> None:
    version, away = publish(server.repository, "birds", 1).with_name("2"), closed_port()
    arguments = ("--repository", server.repository, "--name", "birds", "--triton", f"{away},{server.grpc}")
    exported = run_alexnet("export", checkpoint, *arguments, ALEXNET_TRITON_ADMIN_KEY="hidden-key")
    assert exported.returncode == 1, "one of the two servers is away"
    assert f"{version} is published, but not served everywhere. Triton on {away}: " in exported.stderr
    assert exported.stderr.count("not served everywhere") == 1
    assert "Traceback" not in exported.stderr
    assert "hidden-key" not in exported.stdout + exported.stderr
    assert "2" in ready(server, "birds")

    back = run_alexnet("rollback", "birds", "--repository", server.repository, "--triton", server.grpc)
    assert back.returncode == 0, back.stderr
    assert f"birds/1: served by {server.grpc}" in back.stderr
    assert ready(server, "birds") == ["1"]


def test_an_address_that_is_none_is_told_before_anything_is_exported(tmp_path: Path) -> None:
    done = run_alexnet("export", tmp_path / "absent", "--repository", tmp_path, "--triton", "a:8001,b")
    assert done.returncode == 1
    assert "--triton: 'b' is no HOST:PORT" in done.stderr
    assert not list(tmp_path.iterdir())


def test_servers_are_listed_one_by_one_and_a_name_stands_for_all_its_addresses() -> None:
    assert each_server("a:1, 10.0.0.7:8001,[::1]:2") == ["a:1", "10.0.0.7:8001", "[::1]:2"]
    with pytest.raises(ValueError, match="'b' is no HOST:PORT"):
        each_server("a:1,b")
    assert addresses("localhost:8001") == ["127.0.0.1:8001"]
    assert addresses("[::1]:2") == ["[::1]:2"]
    assert all(place.endswith(":5") for place in addresses(f"{socket.gethostname()}:5"))
