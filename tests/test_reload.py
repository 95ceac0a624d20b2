"""A version published, withdrawn or broken while the gateway serves: no request is lost."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import encoded, picture, serving, tiny_repository

from export.gate import onnx_predictor
from export.golden import golden_images
from export.versions import rollback
from serving.backends import OnnxRuntimeBackend
from serving.contract import Crops
from serving.postprocess import average
from serving.preprocess import prepare
from serving.settings import Settings

PHOTO = encoded(picture(8))
JPEG = {"Content-Type": "image/jpeg"}


def publish(root: Path, version: int, *, answers_as: int | None = None) -> None:
    """A version whose weights are its number's, made aside and renamed as `export.publish` does.

    `answers_as`: its golden images say what that version would have answered.
    """
    aside = tiny_repository(root / f"aside-{version}", version=version, seed=version) / "alexnet"
    other = tiny_repository(root / f"other-{version}", seed=answers_as or version) / "alexnet" / "1"
    golden_images(onnx_predictor(other / "model.onnx"), 1e-4).write(aside / str(version))
    folder = root / "repository" / "alexnet"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "labels.txt").exists():
        shutil.copy(aside / "labels.txt", folder)
    (aside / str(version)).rename(folder / str(version))


@contextmanager
def watching(root: Path) -> Iterator[str]:
    backend = OnnxRuntimeBackend(root / "repository", "alexnet", threads=2, watch_s=0.02)
    with serving(Settings(), backend) as url:
        yield url


def wait_for(url: str, version: str) -> None:
    until = time.monotonic() + 20
    while httpx.get(f"{url}/model").json()["version"] != version:
        assert time.monotonic() < until, f"version {version} is not served"
        time.sleep(0.02)


def wait_for_answer(answers: list[dict[str, Any]], version: str) -> None:
    until = time.monotonic() + 20
    while version not in {answer["model"]["version"] for answer in list(answers)}:
        assert time.monotonic() < until, f"version {version} answered nothing"
        time.sleep(0.02)


def wait_for_log(caplog: pytest.LogCaptureFixture, text: str, times: int = 1) -> None:
    until = time.monotonic() + 20
    while sum(text in record.getMessage() for record in caplog.records) < times:
        assert time.monotonic() < until, f"nothing was said of {text!r}"
        time.sleep(0.02)


def expected_of(root: Path, version: int) -> dict[int, float]:
    path = root / "repository" / "alexnet" / str(version) / "model.onnx"
    mean = average(onnx_predictor(path)(prepare(PHOTO, Crops.TEN)))
    return {index: float(p) for index, p in enumerate(mean)}


def test_requests_under_way_are_answered_while_versions_come(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    answers: list[dict[str, Any]] = []
    statuses: list[int] = []
    stop = threading.Event()

    def client(url: str) -> None:
        with httpx.Client(base_url=url, timeout=20) as http:
            while not stop.is_set():
                response = http.post("/classify?top=10", content=PHOTO, headers=JPEG)
                statuses.append(response.status_code)
                answers.append(response.json())

    with watching(tmp_path) as url:
        clients = [threading.Thread(target=client, args=(url,)) for _ in range(3)]
        for thread in clients:
            thread.start()
        try:
            for version in range(1, 8):
                if version > 1:
                    publish(tmp_path, version)
                wait_for_answer(answers, str(version))
        finally:
            stop.set()
            for thread in clients:
                thread.join()
    assert set(statuses) == {200}
    expected = {version: expected_of(tmp_path, version) for version in range(1, 8)}
    for answer in answers:  # each answer is that of the version it names
        got = {p["index"]: p["probability"] for p in answer["predictions"]}
        assert got == pytest.approx(expected[int(answer["model"]["version"])], abs=1e-5)


def test_a_rollback_is_followed(tmp_path: Path) -> None:
    for version in (1, 2):
        publish(tmp_path, version)
    with watching(tmp_path) as url:
        assert httpx.get(f"{url}/model").json()["version"] == "2"
        rollback(tmp_path / "repository" / "alexnet")
        wait_for(url, "1")


def garbage(root: Path) -> None:
    publish(root, 2)
    aside = root / "aside-2" / "alexnet" / "3"
    aside.mkdir()
    (aside / "model.onnx").write_bytes(b"no model")
    aside.rename(root / "repository" / "alexnet" / "3")


def answers_otherwise(root: Path) -> None:
    publish(root, 3, answers_as=9)


def without_a_file(root: Path) -> None:
    (root / "repository" / "alexnet" / "3").mkdir()


@pytest.mark.parametrize("publish_bad", [garbage, answers_otherwise, without_a_file])
def test_a_bad_version_is_refused_once_and_the_next_good_one_is_served(
    tmp_path: Path, publish_bad: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "alexnet")
    publish(tmp_path, 1)
    with watching(tmp_path) as url:
        publish_bad(tmp_path)
        wait_for_log(caplog, "goes on being served")
        time.sleep(0.2)  # ten more looks at the repository
        assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
        answer = httpx.post(f"{url}/classify", content=PHOTO, headers=JPEG)
        assert answer.status_code == 200
        assert answer.json()["model"]["version"] in ("1", "2")
        assert httpx.get(f"{url}/readyz").status_code == 200
        publish(tmp_path, 4)
        wait_for(url, "4")


def test_a_repository_that_goes_away_and_comes_back_is_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path, 1)
    with watching(tmp_path) as url:
        (tmp_path / "repository").rename(tmp_path / "elsewhere")
        wait_for_log(caplog, "goes on being served")
        assert httpx.get(f"{url}/readyz").status_code == 200
        (tmp_path / "elsewhere").rename(tmp_path / "repository")
        publish(tmp_path, 2)
        wait_for(url, "2")
