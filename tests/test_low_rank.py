"""alexnet export --low-rank: factors found on photographs, their cost bounded, told in the provenance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import encoded, picture, run_alexnet

from commands.low_rank import check_drop, factored
from export.gate import generated_crops
from export.publish import Validation, publish
from export.to_onnx import ExportError
from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint
from model.data import Decoded
from model.evaluate import accuracy, torch_predictor
from model.net import AlexNet, Architecture, ArchitectureError, initialise_kaiming
from serving.contract import Crops
from serving.postprocess import Label
from serving.preprocess import cut_crops

LABELS = [Label(name, name) for name in ("ant", "bee", "cow")]
SAMPLE = Path(__file__).parent.parent / "checkpoints" / "imagenette.safetensors"


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """A random full-rank network whose fc6 and fc7 are 96 wide; its answers differ between images."""
    monkeypatch.setattr("model.net.HIDDEN", 96)
    monkeypatch.setattr("model.compress.HIDDEN", 96)
    torch.manual_seed(5)
    net = AlexNet(Architecture("2012", 3)).eval()
    initialise_kaiming(net)
    with torch.inference_mode():
        x = net.normalise(torch.from_numpy(generated_crops(32)))
        net.fc8.weight.div_(net.logits(x).std(dim=0, keepdim=True).T)
        net.fc8.bias.sub_(net.logits(x).mean(dim=0))
    return Checkpoint(net, LABELS, {"accuracy": {"top1_ten": 0.75}})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for index in range(12):
        folder = tmp_path / "data" / "train" / LABELS[index % 3].wnid
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.jpg").write_bytes(encoded(picture(index)))
    return tmp_path / "data"


def as_answered_by(net: AlexNet) -> Decoded:
    """Random squares whose classes are what `net` says of their centre crops."""
    squares = np.random.default_rng(4).integers(0, 256, (24, 8, 8, 3), np.uint8)
    squares = squares.repeat(32, axis=1).repeat(32, axis=2)
    crops = np.concatenate([cut_crops(square, Crops.CENTER) for square in squares])
    return Decoded(squares, torch_predictor(net)(crops).argmax(axis=1))


def test_factors_are_published_with_their_rank_and_cost(full: Checkpoint, data: Path, tmp_path: Path) -> None:
    small = factored(full, data, 8)
    assert small.net.architecture.low_rank == 8
    assert "accuracy" not in small.facts, "the full network's accuracy is not the factors'"
    decoded = as_answered_by(small.net)
    reference = accuracy(torch_predictor(small.net), decoded)
    validation = Validation(decoded, reference)
    check_drop(full, small, validation)
    source = tmp_path / "net.safetensors"
    checkpoints.save(source, full)
    version = publish(small, source, tmp_path / "repository", "small", validation=validation)
    told = json.loads((version / "provenance.json").read_text())
    assert told["architecture"]["low_rank"] == 8
    assert (told["low_rank"]["rank"], told["low_rank"]["photographs"]) == (8, 12)
    assert told["low_rank"]["accuracy_full_rank"]["top1_center"] < 1
    assert told["accuracy"] == reference
    assert told["parity"]["max_abs_difference"] <= 1e-5


def test_factors_that_cost_too_much_are_refused(full: Checkpoint, data: Path) -> None:
    small = factored(full, data, 1)
    decoded = as_answered_by(full.net)
    validation = Validation(decoded, accuracy(torch_predictor(small.net), decoded))
    with pytest.raises(ExportError, match=r"rank 1: .*top1_center fell from 100.00%.*larger --low-rank"):
        check_drop(full, small, validation)


def test_no_training_photographs_are_refused(full: Checkpoint, tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(ExportError, match="found on training photographs"):
            factored(full, folder, 4)
    with pytest.raises(ArchitectureError, match="ranks of 1 to 96, not 97"):
        factored(full, tmp_path, 97)


def test_a_factored_checkpoint_is_not_factored_again(tmp_path: Path) -> None:
    done = run_alexnet("export", SAMPLE, "--low-rank", "64", "--data", tmp_path, "--repository", tmp_path)
    assert done.returncode == 1
    assert "already of rank" in done.stderr
    assert not list(tmp_path.iterdir())
