"""An ONNX graph written node by node: for the forms where each type and each rounding is chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.to_onnx import IR_VERSION, OPSET, check_readable
from serving.contract import CHANNELS, CROP_SIZE, INPUT_NAME, OUTPUT_NAME


class Graph:
    """Nodes and initializers, each node named as its output."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: Any) -> str:
        self._initializers[name] = numpy_helper.from_array(np.array(value, order="C"), name)
        return name

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def model(self, classes: int) -> onnx.ModelProto:
        """The file of the contract, checked: images uint8 -> probabilities float32 [batch, classes]."""
        image: list[str | int | None] = ["batch", CROP_SIZE, CROP_SIZE, CHANNELS]
        graph = helper.make_graph(
            self._nodes,
            "alexnet",
            [helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, image)],
            [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", classes])],
            list(self._initializers.values()),
        )
        model: onnx.ModelProto = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        onnx.checker.check_model(model, full_check=True)
        check_readable(model)
        return model
