"""config.pbtxt, written and checked with Triton's own protobuf."""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from export.to_onnx import ExportError
from serving.contract import (
    CHANNELS,
    CROP_SIZE,
    INPUT_NAME,
    LABELS_FILE,
    MAX_BATCH,
    OUTPUT_NAME,
)

QUEUE_DELAY_US: Final = 2000
"""How long Triton may hold a request to batch it with others."""

PREFERRED_BATCH: Final = 20
"""Two photographs of ten crops."""


def config_text(name: str, classes: int) -> str:
    """The ModelConfig of an ONNX version of `name`, for the onnxruntime backend."""
    config = model_config_pb2.ModelConfig(
        name=name,
        backend="onnxruntime",
        max_batch_size=MAX_BATCH,
        input=[
            model_config_pb2.ModelInput(
                name=INPUT_NAME,
                data_type=model_config_pb2.TYPE_UINT8,
                dims=[CROP_SIZE, CROP_SIZE, CHANNELS],
            )
        ],
        output=[
            model_config_pb2.ModelOutput(
                name=OUTPUT_NAME,
                data_type=model_config_pb2.TYPE_FP32,
                dims=[classes],
                label_filename=LABELS_FILE,
            )
        ],
        dynamic_batching=model_config_pb2.ModelDynamicBatching(
            preferred_batch_size=[PREFERRED_BATCH], max_queue_delay_microseconds=QUEUE_DELAY_US
        ),
        instance_group=[model_config_pb2.ModelInstanceGroup(count=1)],
    )
    text: str = text_format.MessageToString(config)
    return text


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
