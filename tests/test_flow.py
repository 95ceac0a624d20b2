"""From a stranger's folder to an answer: train, evaluate, export, evaluate the export, classify."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import encoded, run_alexnet

COLOURS = {"blue": (30, 60, 200), "green": (40, 170, 60), "red": (200, 40, 50)}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes told apart by their colour, JPEGs of different sizes."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                size = (*rng.integers(150, 300, 2), 3)
                pixels = (np.array(colour) + rng.normal(0, 25, size)).clip(0, 255).astype(np.uint8)
                (root / split / name / f"{index}.jpg").write_bytes(encoded(Image.fromarray(pixels)))
    return root


@pytest.mark.timeout(300)  # trains, exports and serves: over a minute where others work too
def test_a_folder_becomes_a_served_model(photographs: Path, tmp_path: Path) -> None:
    run, repository = tmp_path / "run", tmp_path / "repository"
    trained = run_alexnet(
        "train", photographs, "--run", run, "--epochs", "3", "--batch-size", "8", "--learning-rate", "0.01",
        "--variant", "owt",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert f"alexnet export {run / 'checkpoint.safetensors'}" in trained.stdout

    exported = run_alexnet(
        "export", run, "--repository", repository, "--name", "colours", "--data", photographs
    )
    assert exported.returncode == 0, exported.stderr
    assert "max |dp|" in exported.stdout
    version = repository / "colours" / "1"
    assert json.loads((version / "provenance.json").read_text())["parity"]["images"] == 18

    figures = []
    for model in (run / "checkpoint.safetensors", version / "model.onnx"):
        evaluated = run_alexnet("evaluate", model, photographs, "--json")
        assert evaluated.returncode == 0, evaluated.stderr
        figures.append(json.loads(evaluated.stdout))
    for torch_s, onnx_s in zip(*figures, strict=True):
        for speedless in (torch_s, onnx_s):
            assert speedless.pop("images_per_s") > 0
        assert torch_s.pop("calibration_error") == pytest.approx(onnx_s.pop("calibration_error"), abs=1e-4)
        assert torch_s == onnx_s
    assert [(f["crops"], f["images"]) for f in figures[0]] == [("center", 18), ("ten", 18)]
    assert figures[0][1]["top1_error"] <= 0.5, "better than the 0.67 of guessing"

    photo = photographs / "val" / "green" / "0.jpg"
    answered = run_alexnet("classify", photo, "--json", "--repository", repository, "--model", "colours")
    labels = [p["label"] for p in json.loads(answered.stdout)["predictions"]]
    assert sorted(labels) == sorted(COLOURS)

    table = run_alexnet("evaluate", version / "model.onnx", photographs / "val")
    assert "top-1 error %" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{}/nowhere", "--run", "{}/run"], "nowhere/train: no such folder"),
        (["train", "{}", "--run", "{}/run", "--resume"], "no run to resume"),
        (["train", "{}", "--recipe", "secret"], "there are modern, paper"),
        (["evaluate", "{}/absent.safetensors", "{}"], "absent.safetensors: no such checkpoint"),
        (["evaluate", "{}/1/model.onnx", "{}"], "model.onnx"),
        (["export", "{}/absent", "--repository", "{}/r"], "absent: no such checkpoint"),
        (["compress", "{}/absent", "{}", "--out", "{}/small"], "absent: no such checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = run_alexnet(*(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert words in line
    assert not (tmp_path / "run").exists()
