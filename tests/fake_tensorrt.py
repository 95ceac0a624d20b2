"""The part of TensorRT that the product uses: a "plan" is the ONNX file, run by ONNX Runtime on the CPU."""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from export.to_tensorrt import Gpu
from serving.contract import INPUT_NAME, MAX_BATCH, OUTPUT_NAME

PLAN = b"plan:"


def tensor(kind: str) -> dict[str, object]:
    return {"Name": "x", "Dimensions": [80, 96, 27, 27], "Format/Datatype": kind}


def layer(kind: str, name: str, reads: str = "Half", writes: str = "Half", **more: object) -> dict[str, Any]:
    """As the inspector of TensorRT 10 tells of one."""
    return {"Name": name, "LayerType": kind, "Inputs": [tensor(reads)], "Outputs": [tensor(writes)], **more}


GOOD_LAYERS = [
    layer("kgen", "__myl_CastTranSubMulCast", reads="UInt8"),
    layer("CaskConvolution", "conv1 + conv1.relu", writes="Float", Weights={"Type": "Half", "Count": 34848}),
    layer("LRN", "lrn1", reads="Float", writes="Float"),
    layer("Reformat", "Reformatting CopyNode for Input Tensor 0 to conv2", reads="Float"),
    layer("CaskConvolution", "conv2 + conv2.relu", reads="Channel major FP16 format where channel % 8 == 0"),
    layer("gemm", "fc6"),
    layer("kgen", "softmax", writes="Float"),
]


@dataclass
class Machine:
    """What the fake TensorRT does; it notes what it was asked."""

    version: str = "10.16.1.11"
    parser_faults: tuple[str, ...] = ()
    profile_index: int = 0
    shape_error: str = ""
    builds: bool = True
    loads: bool = True
    layers: object = field(default_factory=lambda: {"Layers": GOOD_LAYERS})
    largest: int = MAX_BATCH
    answers_backwards: bool = False
    gpu: str = "H200"
    asked: dict[str, Any] = field(default_factory=dict)


def fake_tensorrt(machine: Machine) -> Any:
    """The part of `tensorrt` that is used. A "plan" is the ONNX file, run by ONNX Runtime on the CPU."""
    asked = machine.asked

    class Parser:
        num_errors = len(machine.parser_faults)

        def __init__(self, network: Any, _logger: Any) -> None:
            self.network = network

        def parse(self, model: bytes) -> bool:
            self.network.model = model
            return not machine.parser_faults

        def get_error(self, index: int) -> Any:
            return SimpleNamespace(
                node_name=lambda: "", node=lambda: 7 + index, node_operator=lambda: "LRN",
                desc=lambda: machine.parser_faults[index],
            )  # fmt: skip

    class Profile:
        def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
            if machine.shape_error:
                raise ValueError(machine.shape_error)
            asked["profile"] = (name, shapes)

    class Config:
        profiling_verbosity: object = None
        cache: Any = None

        def set_memory_pool_limit(self, pool: object, limit: int) -> None:
            asked["memory"] = (pool, limit)

        def add_optimization_profile(self, _profile: Profile) -> int:
            return machine.profile_index

        def create_timing_cache(self, stored: bytes) -> Any:
            return SimpleNamespace(stored=stored, serialize=lambda: memoryview(machine.gpu.encode()))

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            if cache.stored not in (b"", machine.gpu.encode()):
                return False
            self.cache = cache
            asked["cache"] = cache.stored
            return True

        def get_timing_cache(self) -> Any:
            return self.cache

    class Builder:
        def __init__(self, _logger: object) -> None:
            pass

        def create_network(self, flags: int) -> Any:
            asked["flags"] = flags
            return SimpleNamespace(model=b"")

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Any, config: Config) -> memoryview | None:
            asked["verbosity"] = config.profiling_verbosity
            return memoryview(PLAN + network.model) if machine.builds else None

    class Runtime:
        def __init__(self, _logger: object) -> None:
            pass

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            return fake_engine(machine, plan.removeprefix(PLAN)) if machine.loads else None

    return SimpleNamespace(
        __version__=machine.version,
        Logger=type("Logger", (), {"WARNING": 2, "__init__": lambda self, severity: None}),
        Builder=Builder,
        OnnxParser=Parser,
        Runtime=Runtime,
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        LayerInformationFormat=SimpleNamespace(JSON="json"),
        DataType=SimpleNamespace(UINT8="uint8", FLOAT="float32"),
    )


def fake_engine(machine: Machine, model: bytes) -> Any:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    classes = session.get_outputs()[0].shape[1]
    shapes = {INPUT_NAME: (-1, 224, 224, 3), OUTPUT_NAME: (-1, classes)}

    class Context:
        def __init__(self) -> None:
            self.addresses: dict[str, int] = {}

        def set_input_shape(self, _name: str, shape: tuple[int, ...]) -> bool:
            self.shape = shape
            return 1 <= shape[0] <= machine.largest

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return True

        def execute_async_v3(self, _stream: int) -> bool:
            images = (ctypes.c_uint8 * int(np.prod(self.shape))).from_address(self.addresses[INPUT_NAME])
            (answers,) = session.run(None, {INPUT_NAME: np.ctypeslib.as_array(images).reshape(self.shape)})
            if machine.answers_backwards:
                answers = np.ascontiguousarray(answers[:, ::-1])
            ctypes.memmove(self.addresses[OUTPUT_NAME], answers.ctypes.data, answers.nbytes)
            return True

    text = machine.layers if isinstance(machine.layers, str) else json.dumps(machine.layers)
    return SimpleNamespace(
        num_io_tensors=2,
        get_tensor_name=[INPUT_NAME, OUTPUT_NAME].__getitem__,
        get_tensor_dtype={INPUT_NAME: "uint8", OUTPUT_NAME: "float32"}.__getitem__,
        get_tensor_shape=shapes.__getitem__,
        get_tensor_profile_shape=lambda _name, _index: [(n, 224, 224, 3) for n in (1, 10, machine.largest)],
        create_execution_context=Context,
        create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda _format: text),
    )


class CpuGpu(Gpu):
    def stream(self) -> int:
        return 0


GPU = CpuGpu("H200", "9.0", "cpu")
