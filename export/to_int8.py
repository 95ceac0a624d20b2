"""AlexNet as an INT8 graph for CPUs: QuantizeLinear/DequantizeLinear (QDQ), static, per channel.

Activations are uint8 with one scale a tensor, weights int8 with one scale an output channel, biases
int32; ONNX Runtime fuses each DequantizeLinear - operator - QuantizeLinear into one integer
operator. The graph is written out layer by layer, not converted, because where things are rounded
decides both its speed and its accuracy:

- The pixels go into conv1 as they are, uint8 with scale 1: no normalisation pass and no rounding.
  The mean is in conv1's bias. Padding there stands for the grey `_INPUT_ZERO`, not for the mean
  (they differ by up to 11 of 255, in a border of two pixels).
- Max pooling works on the uint8 values; it commutes with rounding.
- LRN's factor b^-0.75 is almost a straight line in the sum of squares while those stay small beside
  k, as they do in networks trained with modern initialisation: then LRN is integer arithmetic as
  well (`_lrn_int8`). Where the calibrated range would make the line's error as large as a rounding
  step, LRN is computed in FP32 (`_lrn_fp32`), exact and 16 ms slower.
- The last layer's logits and the softmax are FP32.

On CPUs without VNNI (AVX-512 VNNI or AVX-VNNI, Arm dot products) ONNX Runtime's uint8 x int8 kernels
may saturate: the accuracy has to be measured there (`alexnet evaluate`).
Source: onnxruntime.ai, "Quantize ONNX models".
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from torch import Tensor, nn

from export.calibration import LEVELS, METHODS, Calibration, Range, observe
from export.graph import Graph
from model.evaluate import torch_predictor
from model.lrn import BETA, K, LocalResponseNorm
from model.net import VARIANTS, AlexNet, Convolution
from serving.contract import INPUT_NAME, MEAN, OUTPUT_NAME, STD
from serving.preprocess import Pixels

Doubles = npt.NDArray[np.float64]

LRN_BOUND: Final = 1 / (2 * LEVELS)
"""Largest relative error of LRN's straight line: half a step of uint8 at the range's end."""

_INPUT_ZERO: Final = round(sum(MEAN) / len(MEAN))
_WEIGHT_LEVELS: Final = 127
_BIAS_LEVELS: Final = 2**30
"""Half of int32's range: the other half is left to the products."""


def calibrate(
    net: AlexNet,
    crops: Pixels,
    held_out: Pixels,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Calibration, dict[str, float]]:
    """The calibration of METHODS whose INT8 graph is nearest to `net` on the crops held out.

    Both uint8 [N, 224, 224, 3]. Also returns each method's mean |dp| there.
    """
    observed = observe(net, crops, advance)
    expected = torch_predictor(net)(held_out)
    figures: dict[str, float] = {}
    for method in METHODS:
        graph = int8_graph(net, observed.calibrate(method))
        session = onnxruntime.InferenceSession(
            graph.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        got = session.run([OUTPUT_NAME], {INPUT_NAME: held_out})[0]
        figures[method] = float(np.abs(got - expected).mean())
    return observed.calibrate(min(figures, key=figures.__getitem__)), figures


def to_int8(net: AlexNet, path: Path, calibration: Calibration) -> None:
    """Write the INT8 graph of `net` to `path`."""
    path.write_bytes(int8_graph(net, calibration).SerializeToString())


def int8_graph(net: AlexNet, calibration: Calibration) -> onnx.ModelProto:
    """images uint8 [N, 224, 224, 3] -> probabilities float32 [N, classes]."""
    graph = _Graph()
    pixels = graph.node("Transpose", [INPUT_NAME], "nchw", perm=[0, 3, 1, 2])
    x = _Quantised(pixels, Range(-_INPUT_ZERO, LEVELS - _INPUT_ZERO))
    for number, spec in enumerate(VARIANTS[net.architecture.variant], start=1):
        weight, bias = _parameters(net.get_submodule(f"conv{number}"))
        if number == 1:
            weight, bias = _fold_normalisation(weight, bias)
        x = _convolution(graph, x, f"conv{number}", weight, bias, spec, calibration)
        if spec.lrn:
            lrn = net.get_submodule(f"lrn{number}")
            assert isinstance(lrn, LocalResponseNorm)
            x = _lrn(graph, x, lrn.band.double().numpy(), number, calibration)
        if spec.pool:
            pooled = graph.node("MaxPool", [x.name], f"pool{number}", kernel_shape=[3, 3], strides=[2, 2])
            x = _Quantised(pooled, x.range)
    x = _Quantised(graph.node("Flatten", [x.name], "flatten"), x.range)
    for name in ("fc6", "fc7"):
        layer = net.get_submodule(name)
        if isinstance(layer, nn.Sequential):
            inner = _linear(graph, x, f"{name}.0", layer[0])
            x = graph.quantise(inner, f"{name}.0", calibration.ranges[f"{name}.0"])
            layer = layer[1]
        rectified = graph.node("Relu", [_linear(graph, x, name, layer)], f"{name}.relu")
        x = graph.quantise(rectified, name, calibration.ranges[name])
    graph.node("Softmax", [_linear(graph, x, "fc8", net.fc8)], OUTPUT_NAME, axis=1)
    return graph.model(net.architecture.classes)


class _Quantised:
    """A uint8 tensor of the graph and the real values it stands for."""

    def __init__(self, name: str, range_: Range) -> None:
        self.name, self.range = name, range_


class _Graph(Graph):
    """A graph whose activations and weights are quantised."""

    def quantise(self, x: str, name: str, range_: Range) -> _Quantised:
        quantised = self.node("QuantizeLinear", [x, *self._scale(name, range_)], f"{name}.q")
        return _Quantised(quantised, range_)

    def real(self, x: _Quantised, name: str) -> str:
        return self.node("DequantizeLinear", [x.name, *self._scale(name, x.range)], name)

    def parameters(self, name: str, weight: Doubles, bias: Doubles, x: Range) -> list[str]:
        """Weights int8, each output channel with its scale; biases int32, in units of the products.

        A channel whose bias would not fit, because weights or inputs are tiny, gets coarser weights:
        beside such a bias their products are nothing.
        """
        largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
        scales = np.where(largest == 0, 1, largest) / _WEIGHT_LEVELS
        scales = np.maximum(scales, np.abs(bias) / (x.scale * _BIAS_LEVELS))
        levels = np.round(weight / scales.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int8)
        products = (scales * x.scale).astype(np.float32)
        return [
            self._per_channel(f"{name}.weight", levels, scales.astype(np.float32)),
            self._per_channel(f"{name}.bias", np.round(bias / products).astype(np.int32), products),
        ]

    def _scale(self, name: str, range_: Range) -> tuple[str, str]:
        return (
            self.constant(f"{name}.scale", np.float32(range_.scale)),
            self.constant(f"{name}.zero_point", np.uint8(range_.zero_point)),
        )

    def _per_channel(
        self, name: str, stored: npt.NDArray[Any], scales: npt.NDArray[np.float32]
    ) -> str:
        inputs = [
            self.constant(f"{name}.levels", stored),
            self.constant(f"{name}.scales", scales),
            self.constant(f"{name}.zero_points", np.zeros(len(scales), stored.dtype)),
        ]
        return self.node("DequantizeLinear", inputs, name, axis=0)


def _parameters(layer: nn.Module) -> tuple[Doubles, Doubles]:
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    weight: Doubles = layer.weight.detach().double().numpy()
    bias: Tensor | None = layer.bias
    return weight, np.zeros(len(weight)) if bias is None else bias.detach().double().numpy()


def _fold_normalisation(weight: Doubles, bias: Doubles) -> tuple[Doubles, Doubles]:
    """conv1 of normalised pixels -> conv1 of pixels - _INPUT_ZERO."""
    weight = weight / np.reshape(STD, (1, -1, 1, 1))
    offset = _INPUT_ZERO - np.reshape(MEAN, (1, -1, 1, 1))
    return weight, bias + (weight * offset).sum(axis=(1, 2, 3))


def _convolution(
    graph: _Graph,
    x: _Quantised,
    name: str,
    weight: Doubles,
    bias: Doubles,
    spec: Convolution,
    calibration: Calibration,
) -> _Quantised:
    inputs = [graph.real(x, f"{name}.input"), *graph.parameters(name, weight, bias, x.range)]
    y = graph.node(
        "Conv",
        inputs,
        name,
        kernel_shape=[spec.kernel] * 2,
        strides=[spec.stride] * 2,
        pads=[spec.padding] * 4,
        group=spec.groups,
    )
    rectified = graph.node("Relu", [y], f"{name}.relu")
    return graph.quantise(rectified, name, calibration.ranges[name])


def _linear(graph: _Graph, x: _Quantised, name: str, layer: nn.Module) -> str:
    weight, bias = _parameters(layer)
    inputs = [graph.real(x, f"{name}.input"), *graph.parameters(name, weight, bias, x.range)]
    return graph.node("Gemm", inputs, name, transB=1)


def lrn_line(response: float) -> tuple[float, float, float]:
    """The straight line a + c t nearest to (1 + t)^-0.75 for t in 0..response, by relative error.

    Returns a, c and that largest error. The function is convex: the chord, raised or lowered until
    the error at its ends equals that in the middle.
    """
    t = np.linspace(0, max(response, 1e-6), 1001)
    exact = (1 + t) ** -BETA
    c = (exact[-1] - 1) / t[-1]
    ratio = (1 + c * t) / exact
    a = 2 / (1 + float(ratio.max()))
    return a, float(a * c), float(np.abs(a * ratio - 1).max())


def _lrn(
    graph: _Graph, x: _Quantised, band: Doubles, number: int, calibration: Calibration
) -> _Quantised:
    """`band` [C, C] holds alpha where LRN sums."""
    name = f"lrn{number}"
    a, c, error = lrn_line(calibration.responses[name])
    y = _lrn_fp32(graph, x, band, name) if error > LRN_BOUND else _lrn_int8(graph, x, band, name, a, c)
    return graph.quantise(y, name, calibration.ranges[name])


def _lrn_int8(graph: _Graph, x: _Quantised, band: Doubles, name: str, a: float, c: float) -> str:
    """x * k^-0.75 (a + c t), t = sum of alpha x^2 / k: a square, a 1x1 convolution and a product."""
    largest = Range(0, x.range.high**2)
    square = graph.node(
        "Mul", [graph.real(x, f"{name}.left"), graph.real(x, f"{name}.right")], f"{name}.square"
    )
    squares = graph.quantise(square, f"{name}.square", largest)
    factor = K**-BETA
    slope = (factor * c / K * band)[:, :, np.newaxis, np.newaxis]
    offset = np.full(len(band), factor * a)
    parameters = graph.parameters(f"{name}.sum", slope, offset, largest)
    line = graph.node("Conv", [graph.real(squares, f"{name}.squares"), *parameters], f"{name}.sum")
    factors = graph.quantise(line, f"{name}.sum", Range(0, factor * a))
    return graph.node("Mul", [graph.real(x, f"{name}.x"), graph.real(factors, f"{name}.factor")], name)


def _lrn_fp32(graph: _Graph, x: _Quantised, band: Doubles, name: str) -> str:
    """The formula itself, over the innermost axis: the integer convolutions' layout."""
    real = graph.node("Transpose", [graph.real(x, f"{name}.input")], f"{name}.x", perm=[0, 2, 3, 1])
    square = graph.node("Mul", [real, real], f"{name}.square")
    alpha = graph.constant(f"{name}.band", band.astype(np.float32))
    sums = graph.node("MatMul", [square, alpha], f"{name}.sum")
    b = graph.node("Add", [sums, graph.constant(f"{name}.k", np.float32(K))], f"{name}.b")
    root = graph.node("Sqrt", [b], f"{name}.root")
    fourth = graph.node("Sqrt", [root], f"{name}.fourth_root")
    power = graph.node("Mul", [root, fourth], f"{name}.power")
    y = graph.node("Div", [real, power], f"{name}.nhwc")
    return graph.node("Transpose", [y], name, perm=[0, 3, 1, 2])
