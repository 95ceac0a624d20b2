"""Golden images: a version that answers otherwise than when it was exported is found out."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import FakeBackend, run_alexnet, serving, tiny_repository

from export.gate import onnx_predictor
from export.golden import golden_images
from serving.backends import OnnxRuntimeBackend
from serving.contract import Crops
from serving.errors import ModelNotReady, UnknownModel
from serving.golden import GOLDEN_FOLDER, Golden, GoldenImage
from serving.postprocess import Probabilities
from serving.preprocess import Pixels, prepare
from serving.repository import find_version, latest_version
from serving.settings import Settings
from serving.triton import LocalTriton
from serving.verify import verify_backend, verify_gateway

TOLERANCE = 1e-4


def with_golden(root: Path, *, seed: int = 0, answered_by: Path | None = None) -> Path:
    """A tiny repository whose version carries golden images, answered by its own or another file."""
    repository = tiny_repository(root, seed=seed)
    version = repository / "alexnet" / "1"
    predict = onnx_predictor((answered_by or repository) / "alexnet" / "1" / "model.onnx")
    golden_images(predict, TOLERANCE).write(version)
    return repository


def answers(backend: FakeBackend) -> Golden:
    return golden_images(backend.probabilities, TOLERANCE)


@given(st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_what_is_written_is_read_back(classes: int, seed: int) -> None:
    import tempfile

    rng = np.random.default_rng(seed)
    expected = {c: rng.dirichlet(np.ones(classes)).astype(np.float32) for c in (Crops.CENTER, Crops.TEN)}
    with tempfile.TemporaryDirectory() as folder:
        Golden(0.05, (GoldenImage("1.png", rng.bytes(100), expected),)).write(Path(folder))
        again = Golden.read(Path(folder))
        assert again is not None
        assert again.tolerance == 0.05
        assert (Path(folder) / GOLDEN_FOLDER / "1.png").read_bytes() == again.images[0].data
        for crops, row in expected.items():
            np.testing.assert_allclose(again.images[0].expected[crops], row, atol=1e-7)


def test_the_pictures_are_the_same_on_every_export_small_and_cut_and_scaled() -> None:
    one, two = answers(FakeBackend()), answers(FakeBackend())
    assert [image.data for image in one.images] == [image.data for image in two.images]
    assert sum(len(image.data) for image in one.images) < 60_000
    views = [prepare(image.data, Crops.TEN) for image in one.images]
    assert len({view.tobytes() for view in views}) == len(views) >= 3


def test_the_same_model_differs_by_nothing() -> None:
    backend = FakeBackend()
    golden = answers(backend)
    found = golden.differences(backend.probabilities)
    assert len(found) == 2 * len(golden.images)
    assert {each.max_abs_difference for each in found} == {0.0}
    assert golden.broken(found) is None


def swapped_channels(crops: Pixels) -> Pixels:
    return crops[..., ::-1]


def transposed(crops: Pixels) -> Pixels:
    return crops.transpose(0, 2, 1, 3)


def darker(crops: Pixels) -> Pixels:
    return (crops * 0.9).astype(np.uint8)


@pytest.mark.parametrize("fault", [swapped_channels, transposed, darker])
def test_a_wrong_input_is_found(fault: object) -> None:
    assert callable(fault)
    backend = FakeBackend()
    golden = answers(backend)
    reason = golden.broken(golden.differences(lambda crops: backend.probabilities(fault(crops))))
    assert reason is not None
    assert "a probability is off by" in reason


def test_exchanged_labels_nan_and_another_number_of_classes_are_found() -> None:
    backend = FakeBackend()
    golden = answers(backend)

    def exchanged(crops: Pixels) -> Probabilities:
        row = backend.probabilities(crops)
        likeliest = row.argmax(1)[0]
        row[:, [likeliest, likeliest - 1]] = row[:, [likeliest - 1, likeliest]]
        return row

    for wrong in (
        exchanged,
        lambda crops: backend.probabilities(crops) * np.float32(np.nan),
        lambda crops: backend.probabilities(crops)[:, :-1],
    ):
        assert golden.broken(golden.differences(wrong)) is not None


def test_a_version_that_answers_as_exported_is_loaded(tmp_path: Path) -> None:
    repository = with_golden(tmp_path)
    assert latest_version(repository, "alexnet").golden is not None
    backend = OnnxRuntimeBackend(repository, "alexnet", 1)
    asyncio.run(backend.start())
    assert backend.model.info.version == "1"


def test_a_file_that_was_exchanged_after_the_export_is_not_loaded(tmp_path: Path) -> None:
    other = tiny_repository(tmp_path / "other", seed=1)
    repository = with_golden(tmp_path / "repository", answered_by=other)
    with pytest.raises(ModelNotReady, match=r"does not answer as when it was exported .*export"):
        asyncio.run(OnnxRuntimeBackend(repository, "alexnet", 1).start())


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "golden.json").write_text('{"tolerance": 1e-4, "ima'),
        lambda folder: (folder / "golden.json").write_text('{"tolerance": 1e-4}'),
        lambda folder: (folder / "golden.json").write_text("[]"),
        lambda folder: (folder / "2.png").unlink(),
        lambda folder: (folder / "golden.json").unlink(),
        lambda folder: (folder / "golden.json").write_text('{"tolerance": "much", "images": []}'),
    ],
)
def test_damaged_golden_images_are_told(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    repository = with_golden(tmp_path)
    damage(repository / "alexnet" / "1" / GOLDEN_FOLDER)
    with pytest.raises(ModelNotReady, match="golden images cannot be read"):
        latest_version(repository, "alexnet")


def test_a_damaged_golden_picture_stops_the_load(tmp_path: Path) -> None:
    repository = with_golden(tmp_path)
    picture = repository / "alexnet" / "1" / GOLDEN_FOLDER / "2.png"
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(ModelNotReady, match="does not answer as when it was exported"):
        asyncio.run(OnnxRuntimeBackend(repository, "alexnet", 1).start())


def test_verify_asks_a_running_gateway(tmp_path: Path) -> None:
    repository = with_golden(tmp_path)
    with serving(Settings(), OnnxRuntimeBackend(repository, "alexnet", 1)) as url:
        verdict = verify_gateway(url + "/", repository)
        assert verdict.broken is None
        assert len(verdict.differences) == 6
        done = run_alexnet("verify", url, "--repository", repository)
    assert done.returncode == 0, done.stderr
    assert "alexnet version 1 answers as when it was exported" in done.stdout


def test_verify_asks_a_triton(triton: LocalTriton, tmp_path: Path) -> None:
    same = with_golden(tmp_path / "same")
    done = run_alexnet("verify", f"grpc://{triton.grpc}/alexnet", "--repository", same)
    assert done.returncode == 0, done.stderr
    assert "alexnet version 1 answers as when it was exported" in done.stdout
    other = tiny_repository(tmp_path / "other", seed=1)
    wrong = with_golden(tmp_path / "wrong", answered_by=other)
    done = run_alexnet("verify", f"grpc://{triton.grpc}", "--repository", wrong)
    assert done.returncode == 1
    assert "does not answer as when it was exported (golden image" in done.stderr


def test_an_engine_with_labels_in_another_order_is_told(tmp_path: Path) -> None:
    repository = with_golden(tmp_path)
    served = tiny_repository(tmp_path / "served")
    labels = served / "alexnet" / "labels.txt"
    labels.write_text("\n".join(reversed(labels.read_text().splitlines())) + "\n")
    verdict = asyncio.run(verify_backend(OnnxRuntimeBackend(served, "alexnet", 1), repository))
    assert verdict.broken == "its labels are others, or in another order"


def test_verify_tells_a_server_that_answers_otherwise(tmp_path: Path) -> None:
    running = tiny_repository(tmp_path / "running", seed=1)
    expected = with_golden(tmp_path / "expected", seed=0)
    with serving(Settings(), OnnxRuntimeBackend(running, "alexnet", 1)) as url:
        done = run_alexnet("verify", url, "--repository", expected)
    assert done.returncode == 1
    assert "alexnet version 1 does not answer as when it was exported (golden image" in done.stderr


def test_verify_tells_labels_in_another_order(tmp_path: Path) -> None:
    running, expected = tiny_repository(tmp_path / "running"), with_golden(tmp_path / "expected")
    labels = running / "alexnet" / "labels.txt"
    lines = labels.read_text().splitlines()
    labels.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with serving(Settings(), OnnxRuntimeBackend(running, "alexnet", 1)) as url:
        assert verify_gateway(url, expected).broken is not None


def test_verify_says_what_it_lacks(tmp_path: Path) -> None:
    without, full = tiny_repository(tmp_path / "without"), with_golden(tmp_path / "full")
    with serving(Settings(), OnnxRuntimeBackend(full, "alexnet", 1)) as url:
        with pytest.raises(UnknownModel, match="holds no golden images; export it again"):
            verify_gateway(url, without)
        with pytest.raises(UnknownModel, match="has no version 1 of the model 'alexnet'"):
            verify_gateway(url, tmp_path)
        with pytest.raises(ModelNotReady, match=r"/nowhere/model answers 404"):
            verify_gateway(f"{url}/nowhere", full)
    with pytest.raises(ModelNotReady, match="no answer from a gateway there"):
        verify_gateway(url, full)
    done = run_alexnet("verify", "localhost:8000")
    assert done.returncode == 1
    assert "a server is http://HOST:PORT (a gateway) or grpc://HOST:PORT/MODEL" in done.stderr


def test_a_version_is_found_by_its_number(tmp_path: Path) -> None:
    tiny_repository(tmp_path, version=3)
    assert find_version(tmp_path, "alexnet", "3").number == "3"
    with pytest.raises(UnknownModel):
        find_version(tmp_path, "alexnet", "03")


def test_the_committed_sample_carries_its_golden_images() -> None:
    version = Path(__file__).parent.parent / "model_repository" / "alexnet" / "1"
    golden = Golden.read(version)
    assert golden is not None
    assert golden.tolerance == json.loads((version / "golden" / "golden.json").read_text())["tolerance"]
    found = golden.differences(onnx_predictor(version / "model.onnx"))
    assert golden.broken(found) is None
