"""alexnet export --low-rank: factors found on photographs, their cost bounded, told in the provenance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support import encoded, picture, random_net, run_alexnet
from sure import decided, saved

from commands.low_rank import check_drop, factored
from commands.order import Checked, Order, Version, fulfil
from export.forms import Precision, fp32
from export.gate import FP16_BOUNDS, generated_crops, onnx_predictor
from export.publish import Validation, publish
from export.to_onnx import ExportError, to_onnx
from export.to_tensorrt import NoTensorRTError
from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint, sha256
from model.compress import round_to_half
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
    check_drop(fp32(full.net), small, validation)
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
        check_drop(fp32(full.net), small, validation)


def test_no_training_photographs_are_refused(full: Checkpoint, tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(ExportError, match="found on training photographs"):
            factored(full, folder, 4)
    with pytest.raises(ArchitectureError, match="ranks of 1 to 96, not 97"):
        factored(full, tmp_path, 97)


@pytest.fixture
def wide(narrowed: None) -> AlexNet:
    """A full-rank network whose answers survive INT8."""
    return random_net(low_rank=None, classes=2, conv1=0.1, spread=2)


@pytest.fixture(scope="module")
def narrowed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.net.HIDDEN", 96)
        patch.setattr("model.compress.HIDDEN", 96)
        yield


@pytest.fixture(scope="module")
def order(narrowed: None, tmp_path_factory: pytest.TempPathFactory) -> Order:
    """Factors of rank 96, in every basis the same function, in FP32 and INT8."""
    folder = tmp_path_factory.mktemp("order")
    wide = random_net(low_rank=None, classes=2, conv1=0.1, spread=2)
    _, source = saved(wide, folder)
    data = decided(wide, folder / "data", each=2, pictures=24)
    both = (Precision.FP32, Precision.INT8)
    return Order(source, folder / "models", "small", both, data, low_rank=96)


class Counted:
    """`to_onnx`, and the rank and the hash of each file that it wrote."""

    def __init__(self) -> None:
        self.written: list[tuple[int | None, str]] = []

    def __call__(self, net: AlexNet, path: Path, *, half_storage: bool = False) -> None:
        to_onnx(net, path, half_storage=half_storage)
        self.written.append((net.architecture.low_rank, sha256(path)))


def provenance(version: Version | Checked) -> dict[str, Any]:
    assert isinstance(version, Version)
    told: dict[str, Any] = json.loads((version.folder / "provenance.json").read_text())
    return told


def test_both_precisions_are_of_the_factors_and_each_network_is_exported_once(order: Order) -> None:
    write = Counted()
    single, eight = map(provenance, fulfil(order, write))
    (small, file), (full, _) = write.written
    assert (small, full) == (96, None), "the factors, and the network that they are held against"
    assert single["model"]["sha256"] == file, "the graph that was scored is published"
    assert (single["precision"], eight["precision"]) == ("fp32", "int8")
    for told in (single, eight):
        assert told["architecture"]["low_rank"] == told["low_rank"]["rank"] == 96
        assert told["low_rank"]["photographs"] == 4
        assert told["accuracy"]["images"] == 4
    assert single["low_rank"]["accuracy_full_rank"] == single["accuracy"] == eight["accuracy_fp32"]
    assert eight["calibration"]["crops"] == 3, "two thirds of the training photographs"
    assert eight["model"]["bytes"] < 0.3 * single["model"]["bytes"]


def test_fp32_alone_is_exported_once_and_as_it_was_asked_for(wide: AlexNet, tmp_path: Path) -> None:
    checkpoint, source = saved(round_to_half(wide), tmp_path)
    write, wanted = Counted(), (Precision.FP32,)
    (version,) = fulfil(
        Order(source, tmp_path / "models", precisions=wanted, half_storage=True), write
    )
    to_onnx(checkpoint.net, tmp_path / "half.onnx", half_storage=True)
    assert write.written == [(None, sha256(tmp_path / "half.onnx"))]
    assert provenance(version)["model"]["sha256"] == write.written[0][1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may be able to build engines")
def test_fp16_of_the_factors_is_a_file_of_its_own_and_the_way_on_names_the_rank(
    order: Order, wide: AlexNet
) -> None:
    repository = order.repository.with_name("none")
    done = fulfil(replace(order, repository=repository, precisions=(Precision.FP16,)))
    checked = next(done)
    assert isinstance(checked, Checked)
    assert checked.file == order.checkpoint.with_name("net.rank96.fp16.onnx")
    weights = {tensor.name: tensor.dims for tensor in onnx.load(checked.file).graph.initializer}
    assert [96, 9216] in [sorted(dims) for dims in weights.values()]
    crops = generated_crops(16, seed=2)
    got = onnx_predictor(checked.file)(crops)
    assert np.abs(got - torch_predictor(wide)(crops)).max() < FP16_BOUNDS.max_abs_difference
    with pytest.raises(NoTensorRTError, match=r"none published(.|\n)*--precision fp16 .* --low-rank 96"):
        next(done)
    assert not repository.exists()


def test_a_rank_and_full_width_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"--low-rank factors fc6 and fc7, --full-width .* give one"):
        Order(tmp_path / "absent", low_rank=8, full_width=True)
    done = run_alexnet("export", tmp_path / "absent", "--low-rank", "8", "--full-width")
    assert done.returncode == 1
    assert "give one" in done.stderr and "Traceback" not in done.stderr


def test_factors_that_cost_too_much_publish_nothing_in_any_precision(order: Order) -> None:
    every, repository = tuple(Precision), order.repository.with_name("none")
    with pytest.raises(ExportError, match=r"rank 1: .*larger --low-rank"):
        next(fulfil(replace(order, repository=repository, low_rank=1, precisions=every)))
    assert not repository.exists()
    assert not list(order.checkpoint.parent.glob("*.rank1.*"))


def test_a_factored_checkpoint_is_not_factored_again(tmp_path: Path) -> None:
    done = run_alexnet("export", SAMPLE, "--low-rank", "64", "--data", tmp_path, "--repository", tmp_path)
    assert done.returncode == 1
    assert "already of rank" in done.stderr
    assert not list(tmp_path.iterdir())
