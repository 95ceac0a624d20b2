"""config.pbtxt, written and checked with Triton's own protobuf."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from export.to_onnx import ExportError
from serving.contract import (
    CHANNELS,
    CROP_COUNT,
    CROP_SIZE,
    INPUT_NAME,
    LABELS_FILE,
    MAX_BATCH,
    OUTPUT_NAME,
    PLAN_SUFFIX,
    Crops,
)

PREFERRED_BATCHES: Final = (10, 20, 40, MAX_BATCH)
"""Whole photographs of ten crops. A batch of one of these sizes starts at once, so that a photograph
that is alone does not wait for others."""

QUEUE_DELAY_US: Final = 2000
"""How long Triton may hold requests of other sizes, single crops for instance, to batch them."""

MAX_QUEUE_SIZE: Final = 128
"""Requests that may wait; above it UNAVAILABLE (HTTP 503). A gateway sends at most 32 at a time."""

QUEUE_TIMEOUT_US: Final = 30_000_000
"""How long one may wait where its client sets no time of its own."""

KEPT_VERSIONS: Final = 2
"""The newest is served by default; the one before stays loaded, for clients that name it."""

WARM_UP: Final = (1, CROP_COUNT[Crops.TEN], MAX_BATCH)
"""Batches that Triton runs before it calls a version ready: CUDA plans each size anew (seconds)."""


def config_text(name: str, classes: int, precision: str = "fp32") -> str:
    """The ModelConfig of an ONNX version of `name`, for the onnxruntime backend.

    Fields as in triton-inference-server/common, protobuf/model_config.proto. Without a `kind` the
    instance runs on a GPU where there is one, else on the CPU with a thread for each core.
    """
    text: str = text_format.MessageToString(model_config(name, "onnxruntime", classes, precision))
    return text


def model_config(name: str, backend: str, classes: int, precision: str) -> Any:
    """What every backend's configuration has in common."""
    tensors = model_config_pb2
    batching = tensors.ModelDynamicBatching(
        preferred_batch_size=PREFERRED_BATCHES,
        max_queue_delay_microseconds=QUEUE_DELAY_US,
        default_queue_policy=tensors.ModelQueuePolicy(
            timeout_action=tensors.ModelQueuePolicy.REJECT,
            default_timeout_microseconds=QUEUE_TIMEOUT_US,
            allow_timeout_override=True,
            max_queue_size=MAX_QUEUE_SIZE,
        ),
    )
    return tensors.ModelConfig(
        name=name,
        backend=backend,
        max_batch_size=MAX_BATCH,
        input=[
            tensors.ModelInput(
                name=INPUT_NAME,
                data_type=tensors.TYPE_UINT8,
                format=tensors.ModelInput.FORMAT_NHWC,
                dims=[CROP_SIZE, CROP_SIZE, CHANNELS],
            )
        ],
        output=[
            tensors.ModelOutput(
                name=OUTPUT_NAME, data_type=tensors.TYPE_FP32, dims=[classes], label_filename=LABELS_FILE
            )
        ],
        version_policy=tensors.ModelVersionPolicy(
            latest=tensors.ModelVersionPolicy.Latest(num_versions=KEPT_VERSIONS)
        ),
        dynamic_batching=batching,
        instance_group=[tensors.ModelInstanceGroup(count=1)],
        model_warmup=[_warm_up(size) for size in WARM_UP],
        parameters={"precision": tensors.ModelParameter(string_value=precision)},
    )


CAPABILITIES: Final = (
    "7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1",
)  # fmt: skip
"""Compute capabilities of NVIDIA's GPUs from Turing on, the oldest that TensorRT 10.12 builds for."""


def plan_file(capability: str) -> str:
    """The engine for GPUs of a compute capability: "9.0" -> model_cc90.plan."""
    return f"model_cc{capability.replace('.', '')}{PLAN_SUFFIX}"


def tensorrt_config_text(name: str, classes: int, precision: str = "fp16") -> str:
    """The ModelConfig of a TensorRT version of `name`.

    An engine runs on the GPUs it was built for, so each version holds one file for each compute
    capability and Triton picks its own; one that is absent is named in Triton's error. The map is
    the same in every version, since all versions share this file. CUDA graphs are captured for
    batches of 1, of the preferred sizes and of the largest.
    """
    tensors = model_config_pb2
    config = model_config(name, "tensorrt", classes, precision)
    config.instance_group[0].kind = tensors.ModelInstanceGroup.KIND_GPU
    config.optimization.cuda.graphs = True
    for capability in CAPABILITIES:
        config.cc_model_filenames[capability] = plan_file(capability)
    text: str = text_format.MessageToString(config)
    return text


def _warm_up(size: int) -> Any:
    pixels = model_config_pb2.ModelWarmup.Input(
        data_type=model_config_pb2.TYPE_UINT8, dims=[CROP_SIZE, CROP_SIZE, CHANNELS], random_data=True
    )
    return model_config_pb2.ModelWarmup(
        name=f"{size} crops", batch_size=size, count=1, inputs={INPUT_NAME: pixels}
    )


def parse_config(text: str) -> Any:
    """Text -> ModelConfig; raises ExportError with the line and column of a fault."""
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ExportError(f"config.pbtxt is not a Triton ModelConfig: {error}") from error


def check_config(text: str, classes: int) -> None:
    """Raises ExportError where the configuration does not describe the contract's tensors."""
    config = parse_config(text)
    found = (
        [(t.name, t.data_type, list(t.dims)) for t in config.input],
        [(t.name, t.data_type, list(t.dims)) for t in config.output],
    )
    expected = (
        [(INPUT_NAME, model_config_pb2.TYPE_UINT8, [CROP_SIZE, CROP_SIZE, CHANNELS])],
        [(OUTPUT_NAME, model_config_pb2.TYPE_FP32, [classes])],
    )
    if found != expected:
        raise ExportError(f"config.pbtxt declares {found}, but the model has {expected}")
    if not 0 < config.max_batch_size <= MAX_BATCH:
        raise ExportError(f"config.pbtxt: max_batch_size {config.max_batch_size} is not in 1..{MAX_BATCH}")
    sizes = [*config.dynamic_batching.preferred_batch_size, *(w.batch_size for w in config.model_warmup)]
    if wrong := [size for size in sizes if not 0 < size <= config.max_batch_size]:
        raise ExportError(f"config.pbtxt: batches of {wrong} are not in 1..{config.max_batch_size}")
    if text.count("key:") != text_format.MessageToString(config).count("key:"):
        raise ExportError("config.pbtxt gives one key of a map twice; the parser keeps the last")


def check_file(text: str, path: Path) -> None:
    """Raises ExportError where config.pbtxt and an ONNX file disagree on a tensor's name, type or shape."""
    config = parse_config(text)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for declared, present in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        expected = [(t.name, _ONNX_TYPES[t.data_type], list(t.dims)) for t in declared]
        found = [(t.name, t.type, t.shape[1:]) for t in present]
        if found != expected:
            raise ExportError(f"config.pbtxt declares {expected}, but {path.name} has {found}")
        if any(isinstance(t.shape[0], int) for t in present):
            raise ExportError(f"{path.name}: the batch dimension is fixed at {present[0].shape[0]}")


_ONNX_TYPES: Final = {
    model_config_pb2.TYPE_UINT8: "tensor(uint8)",
    model_config_pb2.TYPE_FP32: "tensor(float)",
}
