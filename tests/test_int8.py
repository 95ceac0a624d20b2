"""INT8: the graph rounds where it should, runs in integers, and stays near the network."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import support
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import run_alexnet
from sure import decided, saved

from export.calibration import LEVELS, METHODS, Calibration, Observed, Range, observe
from export.forms import int8
from export.gate import INT8_BOUNDS, check_accuracy, check_parity, generated_crops
from export.publish import Validation, publish
from export.to_int8 import LRN_BOUND, calibrate, int8_graph, lrn_line, to_int8
from export.to_onnx import ExportError
from model.checkpoint import Checkpoint
from model.data import Decoded
from model.evaluate import Probabilities, torch_predictor
from model.net import VARIANTS, AlexNet
from serving.contract import INPUT_NAME, OUTPUT_NAME
from serving.preprocess import Pixels

CLASSES = 7
NEAR = 0.035
"""Mean |dp| by rounding. A random network's logits differ little between images, so stretched as they are
here they show rounding ten times as large as a trained network's; unrelated answers differ by 0.15."""

random_net = partial(support.random_net, conv1=0.1, spread=2)
"""With activations as after training."""


@pytest.fixture(scope="module")
def net() -> AlexNet:
    return random_net()


@pytest.fixture(scope="module")
def crops() -> Pixels:
    return generated_crops(24, seed=1)


@pytest.fixture(scope="module")
def calibration(net: AlexNet, crops: Pixels) -> Calibration:
    return observe(net, crops).calibrate("max")


def differences(net: AlexNet, graph: onnx.ModelProto, crops: Pixels) -> Probabilities:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run([OUTPUT_NAME], {INPUT_NAME: crops})[0]
    expected = torch_predictor(net)(crops)
    assert np.abs(expected - expected[::-1]).mean() > 4 * NEAR, "the answers differ between images"
    apart: Probabilities = np.abs(got - expected)
    return apart


@pytest.mark.parametrize("low_rank", [24, None])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_answers_stay_near_the_network_s_on_images_it_was_not_calibrated_on(
    variant: str, low_rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.net.HIDDEN", 256)
    net = random_net(variant, low_rank)
    graph = int8_graph(net, observe(net, generated_crops(64, seed=1)).calibrate("max"))
    assert differences(net, graph, generated_crops(32, seed=2)).mean() < NEAR


def test_every_layer_runs_in_integers(net: AlexNet, calibration: Calibration, tmp_path: Path) -> None:
    """What ONNX Runtime makes of the graph: nothing between the pixels and the logits is FP32."""
    to_int8(net, tmp_path / "model.onnx", calibration)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert operators.count("QLinearConv") == 5 + 2, "five convolutions and two sums of squares"
    assert operators.count("QLinearMul") == 4
    assert operators.count("QGemm") == 5
    assert set(operators) <= {
        "QLinearConv", "QLinearMul", "QGemm", "NhwcMaxPool", "MaxPool",
        "Transpose", "Flatten", "Reshape", "Softmax",
    }  # fmt: skip


def test_the_file_is_a_quarter_of_fp32_and_names_its_layers(
    net: AlexNet, calibration: Calibration, tmp_path: Path
) -> None:
    to_int8(net, tmp_path / "model.onnx", calibration)
    parameters = sum(p.numel() for p in net.parameters())
    assert (tmp_path / "model.onnx").stat().st_size < 1.1 * parameters + 100_000
    names = {node.name for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert {"conv1", "lrn1", "pool1", "conv5", "fc6", "fc6.0", "fc8", OUTPUT_NAME} <= names


@settings(deadline=None)
@given(response=st.floats(0, 0.5))
def test_the_line_for_lrn_is_the_nearest_by_relative_error(response: float) -> None:
    a, c, error = lrn_line(response)
    t = np.linspace(0, response, 777)
    deviation = (a + c * t) * (1 + t) ** 0.75 - 1
    assert np.abs(deviation).max() <= error + 1e-7
    assert deviation[0] == pytest.approx(deviation[-1], abs=1e-6)
    assert deviation.min() == pytest.approx(-error, abs=1e-6) or response < 1e-5
    assert error < 0.11 * response**2 + 1e-9


def test_lrn_is_exact_where_a_line_would_not_do(crops: Pixels) -> None:
    """Activations as large as in the paper's days: sums of squares of the size of k."""
    net = random_net(conv1=10)
    calibration = observe(net, crops).calibrate("max")
    assert lrn_line(calibration.responses["lrn1"])[2] > 2 * LRN_BOUND
    graph = int8_graph(net, calibration)
    operators = {node.name: node.op_type for node in graph.graph.node}
    assert operators["lrn1.nhwc"] == "Div"
    assert differences(net, graph, generated_crops(32, seed=3)).mean() < NEAR


@pytest.mark.parametrize("method", METHODS)
def test_a_bias_too_large_for_the_products_scale_is_kept(crops: Pixels, method: str) -> None:
    """Tiny activations: LRN's constant, in units of alpha times their squares, is beyond int32."""
    net = random_net(conv1=0.01)
    graph = int8_graph(net, observe(net, crops).calibrate(method))
    assert differences(net, graph, generated_crops(24, seed=10)).mean() < NEAR


def test_pixels_reach_conv1_unrounded(net: AlexNet, calibration: Calibration) -> None:
    graph = int8_graph(net, calibration).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert constants["conv1.input.scale"] == 1
    assert next(node for node in graph.node if node.name == "nchw").op_type == "Transpose"
    assert not any(node.op_type in ("Cast", "Sub") for node in graph.node)


@pytest.mark.parametrize("method", METHODS)
def test_ranges_hold_zero_exactly_and_cut_no_more_than_their_method(method: str) -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(size=200_000).astype(np.float32)
    observed = Observed()
    observed.add("signed", torch.from_numpy(values))
    observed.add("rectified", torch.from_numpy(values).clamp(min=0))
    ranges = observed.calibrate(method).ranges
    for point in ("signed", "rectified"):
        range_ = ranges[point]
        assert 0 <= range_.zero_point <= LEVELS
        high = float(values.max())
        assert 0.5 * high < range_.high <= high + 1e-6
        if method == "max":
            assert range_.high == pytest.approx(high)
    assert ranges["rectified"].zero_point == 0
    assert ranges["rectified"].low == 0


def test_a_layer_that_is_dead_on_the_images_gets_a_range() -> None:
    observed = Observed()
    observed.add("dead", torch.zeros(5, 3))
    assert observed.calibrate("mse").ranges["dead"] == Range(0, 1)


def test_the_calibration_kept_is_the_nearest_on_images_held_out(net: AlexNet, crops: Pixels) -> None:
    held_out = generated_crops(24, seed=5)
    kept, figures = calibrate(net, crops, held_out)
    assert set(figures) == set(METHODS)
    assert figures[kept.method] == min(figures.values())
    again = differences(net, int8_graph(net, kept), held_out).mean()
    assert again == pytest.approx(figures[kept.method], rel=1e-4)


def test_the_gate_refuses_int8_calibrated_on_noise(net: AlexNet, crops: Pixels, tmp_path: Path) -> None:
    noise = np.random.default_rng(6).integers(112, 144, crops.shape, dtype=np.uint8)
    images = generated_crops(64, seed=7)
    to_int8(net, tmp_path / "right.onnx", observe(net, crops).calibrate("max"))
    check_parity(net, tmp_path / "right.onnx", images, INT8_BOUNDS)
    to_int8(net, tmp_path / "wrong.onnx", observe(net, noise).calibrate("max"))
    with pytest.raises(ExportError, match="top-1 agreement"):
        check_parity(net, tmp_path / "wrong.onnx", images, INT8_BOUNDS)


def test_a_loss_of_accuracy_over_half_a_point_is_refused() -> None:
    reference = {"images": 1000, "top1_center": 0.80, "top1_ten": 0.82, "top5_center": 1, "top5_ten": 1}
    check_accuracy(reference | {"top1_ten": 0.816}, reference, INT8_BOUNDS)
    with pytest.raises(ExportError, match=r"top1_center fell from 80\.00% to 79\.40%.*0\.5 points"):
        check_accuracy(reference | {"top1_center": 0.794}, reference, INT8_BOUNDS)


@pytest.fixture
def source(net: AlexNet, tmp_path: Path) -> tuple[Checkpoint, Path]:
    return saved(net, tmp_path)


def photographs(net: AlexNet, count: int) -> Decoded:
    """Squares, and what the network itself says of their centre crops as their classes."""
    squares = np.pad(generated_crops(count, seed=9), ((0, 0), (16, 16), (16, 16), (0, 0)), mode="reflect")
    centre = squares[:, 16:240, 16:240]
    targets = torch_predictor(net)(np.ascontiguousarray(centre)).argmax(axis=1)
    assert len(np.unique(targets)) > 1
    return Decoded(squares, targets)


def test_a_version_keeps_its_calibration_and_its_own_accuracy(
    source: tuple[Checkpoint, Path], net: AlexNet, crops: Pixels, tmp_path: Path
) -> None:
    data = photographs(net, 24)
    reference = {"images": 24, "top1_center": 1.0, "top5_center": 1.0, "top1_ten": 0.5, "top5_ten": 0.9}
    form = replace(int8(net, crops, generated_crops(8)), bounds=replace(INT8_BOUNDS, accuracy_drop=0.2))
    seen: list[int] = []
    version = publish(
        *source, tmp_path, "birds", form=form, validation=Validation(data, reference, seen.append)
    )
    assert version == tmp_path / "birds_int8" / "1"
    provenance = json.loads((version / "provenance.json").read_text())
    assert provenance["precision"] == "int8"
    assert provenance["calibration"]["method"] in METHODS
    assert provenance["calibration"]["crops"] == len(crops)
    assert provenance["accuracy"]["images"] == 24
    assert provenance["accuracy"]["top1_center"] >= 0.8
    assert provenance["accuracy_fp32"] == reference
    assert provenance["parity"]["bounds"]["accuracy_drop"] == 0.2
    assert sum(seen) == 48, "each image was told of with the centre crop and with ten"


def test_without_photographs_to_validate_on_no_accuracy_is_claimed(
    source: tuple[Checkpoint, Path], net: AlexNet, crops: Pixels, tmp_path: Path
) -> None:
    version = publish(*source, tmp_path, "birds", form=int8(net, crops, crops[:8]))
    assert "accuracy" not in json.loads((version / "provenance.json").read_text())


def test_int8_that_loses_too_much_is_not_published(
    source: tuple[Checkpoint, Path], net: AlexNet, crops: Pixels, tmp_path: Path
) -> None:
    data = photographs(net, 8)
    data.targets[:] = (data.targets + 1) % CLASSES
    reference = {"images": 8, "top1_center": 1.0, "top5_center": 1.0, "top1_ten": 1.0, "top5_ten": 1.0}
    form = int8(net, crops, crops[:8])
    with pytest.raises(ExportError, match="top1_center fell"):
        publish(*source, tmp_path, "birds", form=form, validation=Validation(data, reference))
    assert list((tmp_path / "birds_int8").iterdir()) == []


def test_no_photographs_is_told(net: AlexNet, crops: Pixels) -> None:
    with pytest.raises(ExportError, match="--data"):
        int8(net, crops[:0], crops)


def test_one_line_exports_every_precision_and_tells_how_each_did(tmp_path: Path) -> None:
    net = random_net(classes=2)
    _, source = saved(net, tmp_path)
    decided(net, tmp_path / "data", each=4)
    done = run_alexnet(
        *("export", source, "--repository", tmp_path / "r", "--name", "birds"),
        *("--precision", "fp32,int8", "--data", tmp_path / "data"),
    )
    assert done.returncode == 0, done.stderr
    header, *lines = (line.split() for line in done.stdout.splitlines())
    assert " ".join(header) == "MB ten crops ms max |dp| same top-1 top-1 % version"
    rows = [line for line in lines if len(line) == 6]  # a long path goes on in the next line
    for row, name in zip(rows, ("birds", "birds_int8"), strict=True):
        provenance = json.loads((tmp_path / "r" / name / "1" / "provenance.json").read_text())
        assert 2 <= provenance["auto"]["mean_crops"] <= 10 and 0 <= provenance["auto"]["margin"] < 1
        accuracy = provenance["accuracy"]
        assert accuracy["images"] == 8
        assert float(row[-2]) == pytest.approx(100 * accuracy["top1_ten"], abs=0.01)
        assert float(row[2]) == pytest.approx(provenance["parity"]["max_abs_difference"], rel=0.06)
        assert (tmp_path / "r" / name / "1" / "golden" / "golden.json").exists()
    assert float(rows[1][0]) < 0.3 * float(rows[0][0]), "INT8 is a quarter of FP32"
    asked = run_alexnet("export", source, "--precision", "int8")
    assert asked.returncode == 1
    assert "give their folder with --data" in asked.stderr
    unknown = run_alexnet("export", source, "--precision", "fp8")
    assert unknown.returncode == 1
    assert "--precision is one or more of fp32, int8" in unknown.stderr
