"""The contract in Triton's words: arrays <-> protobuf messages, each answer checked before it counts."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from tritonclient.grpc import service_pb2

from serving.contract import CHANNELS, CROP_COUNT, CROP_SIZE, INPUT_NAME, OUTPUT_NAME
from serving.errors import EngineFailed, ModelNotReady
from serving.postprocess import Label, Probabilities
from serving.preprocess import Pixels

_CONTRACT_INPUT: Final = (INPUT_NAME, "UINT8", [-1, CROP_SIZE, CROP_SIZE, CHANNELS])
_SUM_TOLERANCE: Final = 0.01
"""How far a softmax in FP16 over 1000 classes may miss a sum of 1, with room; noise misses it by more."""


def infer_request(model: str, crops: Pixels, request_id: str = "") -> Any:
    """uint8 [N, 224, 224, 3] -> ModelInferRequest for the latest version, whose number the answer has."""
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    request.inputs.add(name=INPUT_NAME, datatype="UINT8", shape=crops.shape)
    request.outputs.add(name=OUTPUT_NAME)
    request.raw_input_contents.append(np.ascontiguousarray(crops).tobytes())
    return request


def read_probabilities(response: Any, count: int) -> Probabilities:
    """ModelInferResponse -> float32 [count, classes]; raises EngineFailed unless each row is a softmax.

    A server can answer garbage without an error: one whose Python has NumPy 2 under a backend built
    for 1 sends empty outputs.
    """
    output, raw = _only_output(response, "FP32", count)
    classes = output.shape[1]
    if len(raw) != 4 * count * classes:
        raise EngineFailed(f"the model server sent {len(raw)} bytes for {count} x {classes} probabilities")
    probabilities: Probabilities = np.frombuffer(raw, np.float32).reshape(count, classes)
    sums = probabilities.sum(axis=1)
    if not (np.abs(sums - 1) <= _SUM_TOLERANCE).all() or probabilities.min() < 0:  # NaN is not <=
        raise EngineFailed("the model server sent numbers that are no probabilities")
    return probabilities


def labels_request(model: str, crop: Pixels, classes: int, request_id: str = "") -> Any:
    """One crop, uint8 [1, 224, 224, 3], to be answered with each class's label (classification extension)."""
    request = infer_request(model, crop, request_id)
    request.outputs[0].parameters["classification"].int64_param = classes
    return request


def read_labels(response: Any, classes: int) -> tuple[Label, ...]:
    """'probability:index:label' of every class, in any order -> labels; raises ModelNotReady."""
    _, raw = _only_output(response, "BYTES", 1)
    lines: dict[int, str] = {}
    for entry in _strings(raw):
        _, index, *label = entry.split(":", 2)  # a label may hold ':'
        lines.update({int(index): name.strip() for name in label if name.strip()})
    if sorted(lines) != list(range(classes)):
        raise ModelNotReady(
            f"the model has {classes} outputs, but Triton knows the labels of {len(lines)}: "
            "the labels.txt beside its config.pbtxt is of another length, or label_filename is not set"
        )
    return tuple(Label.parse(lines[index]) for index in range(classes))


def check_metadata(metadata: Any) -> int:
    """ModelMetadataResponse -> number of classes; raises ModelNotReady where it is not the contract's."""
    inputs = [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in metadata.inputs]
    if inputs != [_CONTRACT_INPUT]:
        takes, wanted = _told(inputs), _told([_CONTRACT_INPUT])
        raise ModelNotReady(f"the model {metadata.name} takes {takes}, not {wanted}")
    outputs = [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in metadata.outputs]
    for name, datatype, shape in outputs:
        if (name, datatype) == (OUTPUT_NAME, "FP32") and len(shape) == 2 and shape[1] > 1:
            return int(shape[1])
    wanted = f"{OUTPUT_NAME} FP32 [-1, classes]"
    raise ModelNotReady(f"the model {metadata.name} answers {_told(outputs)}, not {wanted}")


def check_config(config: Any) -> str:
    """ModelConfig -> precision; raises ModelNotReady if a photograph's crops do not fit into a batch."""
    most = max(CROP_COUNT.values())
    if config.max_batch_size < most:
        raise ModelNotReady(f"the model {config.name} takes batches of {config.max_batch_size}, not {most}")
    precision: str = config.parameters["precision"].string_value if "precision" in config.parameters else ""
    return precision or "unknown"


def _told(tensors: list[tuple[str, str, list[int]]]) -> str:
    return ", ".join(f"{name} {datatype} {shape}" for name, datatype, shape in tensors) or "nothing"


def _only_output(response: Any, datatype: str, count: int) -> tuple[Any, bytes]:
    outputs, raw = response.outputs, response.raw_output_contents
    if len(outputs) != 1 or len(raw) != 1:
        raise EngineFailed(f"the model server sent {len(outputs)} outputs in {len(raw)} buffers instead of 1")
    output = outputs[0]
    shape = list(output.shape)
    if (output.name, output.datatype) != (OUTPUT_NAME, datatype) or len(shape) != 2 or shape[0] != count:
        told = f"{output.name} {output.datatype} {shape}"
        raise EngineFailed(f"the model server answered {count} crops with {told}")
    return output, raw[0]


def _strings(raw: bytes) -> list[str]:
    """BYTES tensor: each element is its length in four bytes, little endian, then its UTF-8."""
    strings, at = [], 0
    while at < len(raw):
        length = int.from_bytes(raw[at : at + 4], "little")
        strings.append(raw[at + 4 : at + 4 + length].decode("utf-8", errors="replace"))
        at += 4 + length
    return strings
