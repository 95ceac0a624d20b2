"""AlexNet as an FP16-typed graph for GPUs: the file's own types are the precision.

TensorRT 11, and 10 in its strongly typed mode, have no FP16 switch: each layer runs in the type
that the ONNX file gives its tensors. So the graph is written out, not converted: convolutions, pooling
and fully connected layers are float16, weights included, and three islands are float32:

- normalisation. TensorRT lets uint8 stand at the network's border only, so the Cast comes first,
  before the transpose (for a CPU it is the other way round, see `model.net`);
- LRN, since its squares overflow FP16 above 255, and silently: x / inf is 0, not NaN. It is the ONNX
  `LRN` operator, which TensorRT maps to one layer of FP32; the banded form of `model.lrn` is the
  fast one on a CPU, but would be a dense FP32 convolution of C x C here, in TF32 at that;
- softmax, of logits that were rounded once.

A converter (onnxconverter-common 1.16) was tried on the exported graph: 24 Casts instead of 7, and LRN's
sums of squares in FP16, since it tells islands apart by operator and these are convolutions too.

Rounding to FP16 and max pooling commute, so LRN's result is rounded before it is pooled: half the bytes.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto
from torch import nn

from export.gate import FP16_BOUNDS, check_parity
from export.graph import Graph
from export.reference import check_reference
from export.to_onnx import ExportError
from model.checkpoint import replace_durably
from model.fold import fold_batch_norm
from model.lrn import ALPHA, BETA, SIZE, K
from model.net import VARIANTS, AlexNet, Convolution
from serving.contract import INPUT_NAME, MEAN, OUTPUT_NAME, STD
from serving.preprocess import Pixels

Halves = npt.NDArray[np.float16]

LARGEST: Final = float(np.finfo(np.float16).max)
"""65504: what is larger is infinite in FP16."""


def to_fp16(net: AlexNet, path: Path) -> None:
    """Write the FP16 graph of `net` to `path`; raises ExportError where a weight is too large for it."""
    path.write_bytes(fp16_graph(net).SerializeToString())


def write_checked(net: AlexNet, path: Path, crops: Pixels) -> dict[str, Any]:
    """`to_fp16` behind two gates: ONNX Runtime on `crops`, and the reference evaluator.

    Returns what they measured. `path` appears whole, or stays as it was: raises ExportError then.
    """
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        to_fp16(net, beside)
        parity = check_parity(net, beside, crops, FP16_BOUNDS)
        reference = check_reference(net, beside, FP16_BOUNDS)
        replace_durably(beside, path)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)
    return {"onnx": {"file": path.name, "parity": asdict(parity), "reference": asdict(reference)}}


def fp16_graph(net: AlexNet) -> onnx.ModelProto:
    """images uint8 [N, 224, 224, 3] -> probabilities float32 [N, classes], FP16 between."""
    net = fold_batch_norm(net.cpu().eval())
    graph = _Graph()
    x = _normalised(graph)                                                      # float16 [N, 3, 224, 224]
    for number, spec in enumerate(VARIANTS[net.architecture.variant], start=1):
        x = _convolution(graph, x, f"conv{number}", net.get_submodule(f"conv{number}"), spec)
        if spec.lrn:
            x = _lrn(graph, x, f"lrn{number}")
        if spec.pool:
            x = graph.node("MaxPool", [x], f"pool{number}", kernel_shape=[3, 3], strides=[2, 2])
    x = graph.node("Flatten", [x], "flatten")                                   # float16 [N, 9216]
    for name in ("fc6", "fc7"):
        layer = net.get_submodule(name)
        if isinstance(layer, nn.Sequential):
            x = _linear(graph, x, f"{name}.0", layer[0])
            layer = layer[1]
        x = graph.node("Relu", [_linear(graph, x, name, layer)], f"{name}.relu")  # float16 [N, 4096]
    logits = graph.single(_linear(graph, x, "fc8", net.fc8), "logits")
    graph.node("Softmax", [logits], OUTPUT_NAME, axis=1)
    return graph.model(net.architecture.classes)


class _Graph(Graph):
    """A graph of float16 with float32 islands."""

    def half(self, x: str, name: str) -> str:
        return self.node("Cast", [x], name, to=TensorProto.FLOAT16)

    def single(self, x: str, name: str) -> str:
        return self.node("Cast", [x], name, to=TensorProto.FLOAT)

    def parameters(self, name: str, layer: nn.Conv2d | nn.Linear) -> list[str]:
        """Weight and, where there is one, bias as float16."""
        return [
            self.constant(f"{name}.{part}", _rounded(f"{name}.{part}", tensor.detach().numpy()))
            for part, tensor in (("weight", layer.weight), ("bias", layer.bias))
            if tensor is not None
        ]


def _rounded(name: str, values: npt.NDArray[Any]) -> Halves:
    largest = float(np.abs(values).max())
    if not largest <= LARGEST:
        raise ExportError(f"{name} holds {largest:.3g}, and FP16 ends at {LARGEST:.0f}")
    return values.astype(np.float16)


def _normalised(graph: _Graph) -> str:
    pixels = graph.node("Transpose", [graph.single(INPUT_NAME, "pixels")], "nchw", perm=[0, 3, 1, 2])
    mean = np.reshape(np.array(MEAN, np.float32), (-1, 1, 1))
    std = np.reshape(np.array(STD, np.float32), (-1, 1, 1))
    centred = graph.node("Sub", [pixels, graph.constant("mean", mean)], "centred")
    scaled = graph.node("Mul", [centred, graph.constant("inverse_std", 1 / std)], "normalised")
    return graph.half(scaled, "normalised.half")


def _convolution(graph: _Graph, x: str, name: str, layer: nn.Module, spec: Convolution) -> str:
    assert isinstance(layer, nn.Conv2d)
    y = graph.node(
        "Conv",
        [x, *graph.parameters(name, layer)],
        name,
        kernel_shape=[spec.kernel] * 2,
        strides=[spec.stride] * 2,
        pads=[spec.padding] * 4,
        group=spec.groups,
    )
    return graph.node("Relu", [y], f"{name}.relu")


def _lrn(graph: _Graph, x: str, name: str) -> str:
    """ONNX divides alpha by the size of the window; the paper, and `model.lrn`, do not."""
    wide = graph.single(x, f"{name}.single")
    y = graph.node("LRN", [wide], name, size=SIZE, alpha=ALPHA * SIZE, beta=BETA, bias=K)
    return graph.half(y, f"{name}.half")


def _linear(graph: _Graph, x: str, name: str, layer: nn.Module) -> str:
    assert isinstance(layer, nn.Linear)
    return graph.node("Gemm", [x, *graph.parameters(name, layer)], name, transB=1)
