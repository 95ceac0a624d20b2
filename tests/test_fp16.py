"""FP16: the types stand in the file, its answers stay within the bound, and no overflow hides."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import support
import torch
from onnx import TensorProto, shape_inference
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_conv

from export.gate import BATCH_SIZES, FP16_BOUNDS, check_parity, generated_crops
from export.reference import LRN, Conv, adversarial_crops, check_reference
from export.to_fp16 import LARGEST, fp16_graph, to_fp16
from export.to_onnx import ExportError
from model.evaluate import torch_predictor
from model.lrn import ALPHA, BETA, SIZE, K, LocalResponseNorm
from model.net import VARIANTS, AlexNet
from serving.contract import INPUT_NAME, MEAN, OUTPUT_NAME, STD

CLASSES = 7

random_net = partial(support.random_net, conv1=1, spread=0.5)
"""More spread would need wider bounds than a trained network does."""


@pytest.fixture(scope="module")
def net() -> AlexNet:
    return random_net()


@pytest.fixture(scope="module")
def file(net: AlexNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp16") / "model.onnx"
    to_fp16(net, path)
    return path


@pytest.mark.parametrize("low_rank", [24, None])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_its_answers_are_the_network_s_within_the_bound_by_two_evaluators(
    variant: str, low_rank: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.net.HIDDEN", 256)
    net, path = random_net(variant, low_rank), tmp_path / "model.onnx"
    answers = torch_predictor(net)(generated_crops(8))
    assert np.abs(answers - answers[::-1]).mean() > 10 * 5e-3, "the answers differ between images"
    to_fp16(net, path)
    parity = check_parity(net, path, generated_crops(3, seed=1), FP16_BOUNDS)
    assert parity.batch_sizes == BATCH_SIZES
    reference = check_reference(net, path, FP16_BOUNDS, images=1)
    assert reference.images == 3
    assert reference.max_abs_difference > 1e-5, "nothing was rounded"
    assert 1 < reference.largest < LARGEST / 4


def test_batch_norm_is_folded_first(tmp_path: Path) -> None:
    net = random_net(batch_norm=True)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.uniform_(-0.1, 0.1)
    to_fp16(net, tmp_path / "model.onnx")
    check_parity(net, tmp_path / "model.onnx", generated_crops(2), FP16_BOUNDS)


def test_convolutions_and_gemms_are_half_and_the_three_islands_are_not(net: AlexNet) -> None:
    graph = shape_inference.infer_shapes(fp16_graph(net), strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    types[INPUT_NAME] = graph.input[0].type.tensor_type.elem_type
    half = {"Conv", "Gemm", "MaxPool", "Relu", "Flatten"}
    single = {"Transpose", "Sub", "Mul", "LRN", "Softmax"}
    for node in graph.node:
        found = {types[name] for name in (*node.input, *node.output)}
        if node.op_type in half:
            assert found == {TensorProto.FLOAT16}, node.name
        elif node.op_type in single:
            assert found == {TensorProto.FLOAT}, node.name
        else:
            assert node.op_type == "Cast" and len(found) == 2, node.name
    kinds = [node.op_type for node in graph.node]
    assert [kinds.count(kind) for kind in ("Conv", "Gemm", "LRN")] == [5, 5, 2]
    assert kinds.count("Cast") == 2 + 2 * 2 + 1, "in and out of each island, once"
    assert graph.node[0].op_type == "Cast", "TensorRT converts uint8 before it does anything else"


def test_the_contract_is_kept_with_a_symbolic_batch(file: Path, net: AlexNet) -> None:
    graph = onnx.load(file).graph
    (images,), (probabilities,) = graph.input, graph.output
    for value in (images, probabilities):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for count in (1, 2, 7, 10):
        crops = generated_crops(count, seed=count)
        got = session.run([OUTPUT_NAME], {INPUT_NAME: crops})[0]
        assert got.dtype == np.float32 and got.shape == (count, CLASSES)
        assert np.abs(got - torch_predictor(net)(crops)).max() < 5e-3


def test_the_file_is_half_of_fp32_and_names_its_layers(file: Path, net: AlexNet) -> None:
    parameters = sum(p.numel() for p in net.parameters())
    assert file.stat().st_size < 2.02 * parameters + 20_000
    names = {node.name for node in onnx.load(file).graph.node}
    assert {"normalised", "conv1", "lrn1", "pool1", "conv5", "fc6", "fc6.0", "fc8", OUTPUT_NAME} <= names


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_no_picture_drives_conv1_further_than_the_adversarial_ones(variant: str) -> None:
    net = random_net(variant)
    conv1 = net.get_submodule("conv1")
    weight, bias = conv1.get_parameter("weight").detach(), conv1.get_parameter("bias").detach()
    low, high = ((torch.tensor(end) / torch.tensor(STD)).reshape(-1, 1, 1)
                 for end in ([-m for m in MEAN], [255 - m for m in MEAN]))  # fmt: skip
    most = (weight.clamp(min=0) * high + weight.clamp(max=0) * low).sum(dim=(1, 2, 3)) + bias
    least = (weight.clamp(min=0) * low + weight.clamp(max=0) * high).sum(dim=(1, 2, 3)) + bias
    with torch.inference_mode():
        responses = conv1(net.normalise(torch.from_numpy(adversarial_crops(net))))
    np.testing.assert_allclose(responses[0].amax(dim=(1, 2)), most, rtol=1e-3)
    np.testing.assert_allclose(responses[0].amin(dim=(1, 2)), least, rtol=1e-3)
    assert responses[1].max() == pytest.approx(float(most.max()), rel=1e-3)


def all_half(path: Path, name: str) -> Path:
    """The file's twin whose LRN is FP16 as well."""
    model = onnx.load(path)
    for node in model.graph.node:
        if node.name.startswith("lrn") and node.op_type == "Cast":
            node.attribute[0].i = TensorProto.FLOAT16
    onnx.checker.check_model(model, full_check=True)
    twin = path.with_name(name)
    onnx.save(model, twin)
    return twin


def test_an_overflow_that_onnx_runtime_hides_on_a_cpu_is_refused(tmp_path: Path) -> None:
    loud, path = random_net(conv1=20), tmp_path / "model.onnx"
    to_fp16(loud, path)
    assert check_reference(loud, path, FP16_BOUNDS, images=1).largest > 256, "whose square is infinite"
    twin = all_half(path, "all_half.onnx")
    check_parity(loud, twin, generated_crops(8), FP16_BOUNDS)
    with pytest.raises(ExportError, match=r"all_half\.onnx: computed in its own types, max \|dp\|"):
        check_reference(loud, twin, FP16_BOUNDS, images=1)


def test_a_convolution_that_overflows_is_named(net: AlexNet, tmp_path: Path) -> None:
    loud, path = copy.deepcopy(net), tmp_path / "model.onnx"
    with torch.no_grad():
        loud.get_submodule("conv1").get_parameter("weight").mul_(30_000)
    to_fp16(loud, path)
    with pytest.raises(ExportError, match="conv1 overflows float16"):
        check_reference(loud, path, FP16_BOUNDS, images=1)


def test_a_weight_that_fp16_cannot_hold_is_refused(net: AlexNet) -> None:
    wide = copy.deepcopy(net)
    with torch.no_grad():
        wide.fc8.bias[2] = 7e4
    with pytest.raises(ExportError, match=r"fc8\.bias holds 7e\+04, and FP16 ends at 65504"):
        fp16_graph(wide)
    with torch.no_grad():
        wide.fc8.bias[2] = float("nan")
    with pytest.raises(ExportError, match=r"fc8\.bias holds nan"):
        fp16_graph(wide)


def test_a_file_of_another_network_is_refused(net: AlexNet, file: Path) -> None:
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.fc8.weight.copy_(other.fc8.weight.flip(0))
    with pytest.raises(ExportError, match="over the bound 5e-03, on 3 images"):
        check_reference(other, file, FP16_BOUNDS, images=1)


def test_the_faster_convolution_is_the_reference_s_own_to_one_rounding() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(1, 6, 9, 9)).astype(np.float16)
    w, b = rng.normal(size=(4, 3, 3, 3)).astype(np.float16), rng.normal(size=4).astype(np.float16)
    attributes = {"group": 2, "kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}
    fast = run(Conv, x, w, b, auto_pad=None, dilations=None, **attributes)
    slow = run(op_conv.Conv, x, w, b, auto_pad=None, dilations=None, **attributes)
    assert fast.dtype == np.float16
    np.testing.assert_allclose(fast, slow, rtol=2e-3, atol=1e-2)


def test_the_reference_lrn_is_the_network_s() -> None:
    x = 30 * torch.rand(2, 9, 4, 5)
    y = run(LRN, x.numpy(), alpha=ALPHA * SIZE, beta=BETA, bias=K, size=SIZE)
    np.testing.assert_allclose(y, LocalResponseNorm(9)(x), rtol=1e-5)


def run(operator: type[OpRun], *inputs: Any, **attributes: Any) -> Any:
    """One operator of the reference evaluator, without a graph around it."""
    (output,) = operator.__new__(operator)._run(*inputs, **attributes)  # type: ignore[no-untyped-call]
    return output
