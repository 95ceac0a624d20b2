"""The embedded engine and the repository it reads: real ONNX Runtime on a tiny network."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from support import LABELS, tiny_repository

from serving.backends import OnnxRuntimeBackend
from serving.errors import ModelNotReady
from serving.repository import latest_version, version_numbers


def random_crops(count: int, seed: int) -> np.ndarray:
    """Crops of different mean colours, uint8 [count, 224, 224, 3]."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 100, (count, 224, 224, 3))
    return (noise + rng.integers(0, 156, (count, 1, 1, 3))).astype(np.uint8)


def test_the_embedded_engine_answers_as_the_formula(tmp_path: Path) -> None:
    repository = tiny_repository(tmp_path, seed=4)
    weights = np.random.default_rng(4).normal(0, 0.05, (3, 10)).astype(np.float32)

    async def run() -> None:
        backend = OnnxRuntimeBackend(repository, "alexnet", threads=1)
        with pytest.raises(ModelNotReady, match="not loaded"):
            _ = backend.model
        await backend.start()
        assert backend.model.labels == LABELS
        assert backend.model.info.version == "1"
        assert backend.model.info.backend == "onnxruntime"
        assert backend.model.provenance["accuracy"] == {"top1_ten": 0.5}
        for count in (1, 3, 10):
            crops = random_crops(count, count)
            powers = np.exp(crops.mean(axis=(1, 2)) @ weights)
            expected = powers / powers.sum(axis=1, keepdims=True)
            inference = await backend.infer(crops)
            assert inference.model is backend.model
            np.testing.assert_allclose(inference.probabilities, expected, rtol=1e-3)
        await backend.close()

    asyncio.run(run())


def test_many_inferences_at_once_do_not_mix(tmp_path: Path) -> None:
    async def run() -> None:
        backend = OnnxRuntimeBackend(tiny_repository(tmp_path), "alexnet", threads=2)
        await backend.start()
        batches = [random_crops(2, seed) for seed in range(12)]
        alone = [(await backend.infer(batch)).probabilities for batch in batches]
        together = await asyncio.gather(*(backend.infer(batch) for batch in batches))
        np.testing.assert_allclose(alone, [each.probabilities for each in together], rtol=1e-6)
        await backend.close()

    asyncio.run(run())


@pytest.mark.parametrize(("largest", "concurrency"), [(0, 1), (10**9, 2)])
def test_only_a_small_model_is_opened_twice_and_either_way_the_answers_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int, concurrency: int
) -> None:
    monkeypatch.setattr("serving.backends.BESIDE_MAX_BYTES", largest)

    async def run() -> None:
        backend = OnnxRuntimeBackend(tiny_repository(tmp_path), "alexnet", threads=2)
        await backend.start()
        assert backend.concurrency == concurrency
        batches = [random_crops(10, seed) for seed in range(6)]
        alone = [(await backend.infer(batch)).probabilities for batch in batches]
        together = [asyncio.create_task(backend.infer(batch)) for batch in batches]
        await asyncio.sleep(0)
        together[3].cancel()
        given = await asyncio.gather(*together, return_exceptions=True)
        assert isinstance(given.pop(3), asyncio.CancelledError)
        del alone[3]
        for before, answer in zip(alone, given, strict=True):
            assert not isinstance(answer, BaseException)
            np.testing.assert_allclose(answer.probabilities, before, rtol=1e-6)
        await backend.close()

    asyncio.run(run())


def start_error(repository: Path) -> str:
    backend = OnnxRuntimeBackend(repository, "alexnet", threads=1)
    with pytest.raises(ModelNotReady) as caught:
        asyncio.run(backend.start())
    text = str(caught.value)
    assert "alexnet export" in text
    assert "\n" not in text
    return text


def test_a_missing_or_damaged_model_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    assert str(tmp_path / "alexnet") in start_error(tmp_path)
    tiny_repository(tmp_path)
    model = tmp_path / "alexnet" / "1" / "model.onnx"
    whole = model.read_bytes()
    for damaged in (b"", b"not a model", whole[: len(whole) // 2]):
        model.write_bytes(damaged)
        assert str(model) in start_error(tmp_path)
    model.unlink()
    assert "no such file" in start_error(tmp_path)
    model.write_bytes(whole)
    (tmp_path / "alexnet" / "1" / "provenance.json").write_text("{")
    assert "provenance.json" in start_error(tmp_path)


def test_labels_of_another_count_stop_the_start(tmp_path: Path) -> None:
    tiny_repository(tmp_path, classes=5)
    labels = tmp_path / "alexnet" / "labels.txt"
    labels.write_text("one\ntwo\n")
    assert "5 outputs, but labels.txt has 2" in start_error(tmp_path)
    labels.unlink()
    assert "labels.txt" in start_error(tmp_path)


def test_the_highest_number_is_served_and_other_names_are_no_versions(tmp_path: Path) -> None:
    for version in (2, 10):
        tiny_repository(tmp_path, version=version)
    for name in (".staging-11-1", "011", "draft", "12x"):
        (tmp_path / "alexnet" / name).mkdir()
    (tmp_path / "alexnet" / "13").write_text("a file, not a version")
    assert version_numbers(tmp_path / "alexnet") == [2, 10]
    assert latest_version(tmp_path, "alexnet").number == "10"
