"""Triton's `onnxruntime` backend, in Python: for `alexnet triton`, whose server has only a Python backend.

Reads the config.pbtxt and model.onnx that NVIDIA's container serves with its native backend, and
the same parameters (https://github.com/triton-inference-server/onnxruntime_backend, README). Runs in
Triton's environment, so it imports nothing of this project.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

MODEL_FILE = "model.onnx"


class TritonPythonModel:
    """One instance of one version."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open <model>/<version>/model.onnx; an error here fails the load, and the older version stays."""
        config = json.loads(args["model_config"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        path = Path(args["model_repository"], args["model_version"], MODEL_FILE)
        self.session = onnxruntime.InferenceSession(
            str(path), session_options(config.get("parameters", {})), providers=["CPUExecutionProvider"]
        )
        for declared, present in (
            (self.inputs, self.session.get_inputs()),
            (self.outputs, self.session.get_outputs()),
        ):
            names = [tensor.name for tensor in present]
            if not set(declared) <= set(names):
                raise ValueError(f"{path}: config.pbtxt declares {declared}, the file has {names}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """All requests of one execution in one run; what the client took back is not computed."""
        responses: list[Any] = [None] * len(requests)
        live = []
        for index, request in enumerate(requests):
            if request.is_cancelled():
                error = pb_utils.TritonError("cancelled", pb_utils.TritonError.CANCELLED)
                responses[index] = pb_utils.InferenceResponse(error=error)
            else:
                live.append((index, self.read(request)))
        if live:
            try:
                answered = self.run([tensors for _, tensors in live])
            except Exception as error:  # noqa: BLE001  whatever it is, these requests are told
                told = pb_utils.TritonError(str(error).splitlines()[0])
                answered = [pb_utils.InferenceResponse(error=told) for _ in live]
            for (index, _), response in zip(live, answered, strict=True):
                responses[index] = response
        return responses

    def read(self, request: Any) -> list[np.ndarray]:
        """The request's inputs as NumPy arrays, in the order of the config."""
        return [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs]

    def run(self, batches: list[list[np.ndarray]]) -> list[Any]:
        """One inference over the batches joined, its outputs cut apart again."""
        joined = [
            parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in zip(*batches, strict=True)
        ]
        outputs = self.session.run(self.outputs, dict(zip(self.inputs, joined, strict=True)))
        ends = np.cumsum([len(tensors[0]) for tensors in batches])
        return [
            pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor(name, np.ascontiguousarray(output[end - len(tensors[0]) : end]))
                    for name, output in zip(self.outputs, outputs, strict=True)
                ]
            )
            for tensors, end in zip(batches, ends, strict=True)
        ]


def session_options(parameters: dict[str, dict[str, str]]) -> onnxruntime.SessionOptions:
    """The native backend's parameters that mean something on a CPU."""

    def given(name: str) -> int | None:
        return int(parameters[name]["string_value"]) if name in parameters else None

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = given("intra_op_thread_count") or 0
    options.inter_op_num_threads = given("inter_op_thread_count") or 0
    if given("execution_mode"):
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    options.enable_cpu_mem_arena = given("enable_mem_arena") != 0
    options.enable_mem_pattern = given("enable_mem_pattern") != 0
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
