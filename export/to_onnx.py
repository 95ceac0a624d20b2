"""A checkpoint becomes one ONNX file: symbolic batch, weights inside, readable names."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from model.fold import fold_input_scale
from model.net import AlexNet
from serving.contract import CHANNELS, CROP_SIZE, INPUT_NAME, MAX_BATCH, OUTPUT_NAME

OPSET: Final = 20
IR_VERSION: Final = 10
READERS: Final = {"ONNX Runtime 1.18": (21, 10), "TensorRT 10": (20, 10)}
"""The oldest engines that must read the files, with the newest opset and IR version they accept.
Sources: onnxruntime.ai, "ONNX Runtime compatibility"; onnx-tensorrt 10.0, docs/operators.md."""

_HALF_MIN_SIZE: Final = 100_000
"""Initializers smaller than this stay FP32: biases, LRN's bands and constants weigh nothing."""


class ExportError(Exception):
    """The network could not be exported or published; nothing became visible."""


def to_onnx(net: AlexNet, path: Path, *, half_storage: bool = False) -> None:
    """Write `net` as an FP32 graph to `path`.

    With `half_storage` the large weights are stored as FP16 and widened by a Cast that the
    runtime folds away while loading: half the file, the same FP32 arithmetic.
    """
    model = trace(net)
    if half_storage:
        store_half(model)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def trace(net: AlexNet) -> onnx.ModelProto:
    """The exported graph; raises ExportError if its batch dimension is not symbolic."""
    example = torch.zeros(2, CROP_SIZE, CROP_SIZE, CHANNELS, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with _quiet():
        program = torch.onnx.export(
            fold_input_scale(net.cpu().eval()).to(memory_format=torch.contiguous_format),  # type: ignore[call-overload]
            (example,),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes={INPUT_NAME: {0: batch}},
            opset_version=OPSET,
            external_data=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise ExportError(f"the batch dimension of {value.name} is fixed in the exported graph")
    _forget_the_machine(model)
    check_readable(model)
    return model


def check_readable(model: onnx.ModelProto) -> None:
    """Raises ExportError if one of READERS is too old for the file."""
    opset = max(entry.version for entry in model.opset_import if not entry.domain)
    for reader, (newest_opset, newest_ir) in READERS.items():
        if opset > newest_opset or model.ir_version > newest_ir:
            raise ExportError(
                f"{reader} reads opset {newest_opset} and IR version {newest_ir} at most, "
                f"and the graph has {opset} and {model.ir_version}"
            )


def store_half(model: onnx.ModelProto) -> None:
    """Replace each large FP32 initializer by an FP16 one and a Cast to FP32.

    Raises ExportError for a weight that FP16 cannot hold exactly: round the checkpoint first
    (a checkpoint saved as FP16 is), so that what is served is what was evaluated.
    """
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < _HALF_MIN_SIZE:
            continue
        values = numpy_helper.to_array(tensor)
        half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):
            raise ExportError(f"{tensor.name} is not exact in FP16; export a checkpoint saved as FP16")
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
        casts.append(
            helper.make_node("Cast", [f"{name}.half"], [name], f"widen {name}", to=TensorProto.FLOAT)
        )
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]


def _forget_the_machine(model: onnx.ModelProto) -> None:
    """Drop the exporter's stack traces: they name paths of the machine and tell users nothing."""
    model.doc_string = ""
    model.graph.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
    del model.graph.metadata_props[:]


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter reports its own progress on stdout and its own deprecations as warnings."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
