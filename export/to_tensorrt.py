"""An FP16 ONNX file becomes a TensorRT engine (a "plan"), on the machine and GPU that will serve it.

One path for TensorRT 10.12 and later and 11. The network is strongly typed: 11 knows nothing else, and
10 without it would choose types by itself, FP32 as soon as a flag is missing. What was built is read
back with the engine inspector, and refused if a convolution or a matrix product runs in FP32.

The bindings (`tensorrt`, or `tensorrt_bindings` over a system's own libraries) are imported when asked
for and passed on as `trt`, so that tests can pass others.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from tritonclient.grpc import model_config_pb2

from export.config import parse_config, plan_file
from export.to_onnx import ExportError
from model.evaluate import Predict, Probabilities
from serving.contract import CHANNELS, CROP_COUNT, CROP_SIZE, INPUT_NAME, MAX_BATCH, OUTPUT_NAME, Crops
from serving.preprocess import Pixels

OLDEST: Final = (10, 12)
"""The first TensorRT whose strongly typed networks build as those of 11 do."""

PROFILE: Final = (1, CROP_COUNT[Crops.TEN], MAX_BATCH)
"""Least, commonest and largest batch: one crop, one photograph, and the `max_batch_size` of
config.pbtxt (Triton loads no engine whose profile ends below it)."""

WORKSPACE_BYTES: Final = 2**31
"""Scratch memory that a kernel may take: conv2's largest at batch 80 want a few hundred MB."""

_MATRIX_LAYER: Final = re.compile(r"conv|gemm|matrix|matmul|fullyconnected", re.IGNORECASE)
_SINGLE: Final = re.compile(r"\b(FP32|TF32|Float)\b", re.IGNORECASE)
_HALF: Final = re.compile(r"\b(FP16|Half)\b", re.IGNORECASE)


class NoTensorRTError(ExportError):
    """This machine cannot build engines: the bindings, their version or a GPU is missing."""


@dataclass(frozen=True)
class Gpu:
    """The GPU that engines are built for and run on, through torch's memory and stream."""

    name: str
    capability: str
    """Compute capability, for instance "9.0"."""
    device: str = "cuda"

    @property
    def plan(self) -> str:
        """The engine's file, as config.pbtxt names it for GPUs of this kind."""
        return plan_file(self.capability)

    def stream(self) -> int:
        """The handle of the stream that torch's copies are on, so that they and the engine keep order."""
        return torch.cuda.current_stream().cuda_stream


def load_tensorrt(load: Callable[[str], Any] = importlib.import_module) -> Any:
    """The bindings; raises NoTensorRTError where there are none, or none new enough."""
    faults = []
    for name in ("tensorrt", "tensorrt_bindings"):
        try:
            trt = load(name)
        except ImportError as error:
            faults.append(str(error))
            continue
        if _version(trt.__version__) < OLDEST:
            raise NoTensorRTError(
                f"TensorRT {trt.__version__} is too old: strongly typed engines need "
                f"{'.'.join(map(str, OLDEST))} or newer"
            )
        return trt
    raise NoTensorRTError(f"TensorRT's Python bindings cannot be imported ({'; '.join(faults)})")


def find_gpu() -> Gpu:
    """The current CUDA device; raises NoTensorRTError where torch sees none."""
    if not torch.cuda.is_available():
        built = "sees no CUDA device" if torch.version.cuda else "is built without CUDA"
        raise NoTensorRTError(f"there is no GPU to build for: torch {torch.__version__} {built}")
    major, minor = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), f"{major}.{minor}")


def find_tensorrt() -> tuple[Any, Gpu]:
    """Bindings and GPU; raises NoTensorRTError with everything that is missing."""
    found: list[Any] = []
    faults = []
    for find in (load_tensorrt, find_gpu):
        try:
            found.append(find())
        except NoTensorRTError as error:
            faults.append(str(error))
    if faults:
        raise NoTensorRTError("; ".join(faults))
    return found[0], found[1]


@dataclass(frozen=True)
class Engine:
    """A plan and what was read back of it."""

    plan: bytes
    facts: dict[str, Any]
    layers: str
    """The inspector's own JSON, every layer with its types and tactic."""


def build_engine(
    trt: Any, gpu: Gpu, model: Path, timing_cache: Path, batches: tuple[int, int, int] = PROFILE
) -> Engine:
    """Build, read back and check the engine of an ONNX file, for `batches` as in PROFILE.

    `timing_cache` spares measuring kernels anew; it is read if this TensorRT and GPU wrote it, and
    replaced whole. Raises ExportError with what TensorRT refused.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    plan = _build(trt, logger, model, timing_cache, batches)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ExportError(f"TensorRT {trt.__version__} cannot read the engine that it built of {model.name}")
    layers = _inspect(trt, engine, batches[-1])
    facts = {
        "tensorrt": trt.__version__,
        "gpu": gpu.name,
        "compute_capability": gpu.capability,
        "batches": list(batches),
        "layers": check_layers(layers),
    }
    return Engine(plan, {"engine": facts}, layers)


def write_engine(built: Engine, path: Path) -> None:
    """The plan, and beside it what the inspector read back of it."""
    path.write_bytes(built.plan)
    path.with_suffix(".layers.json").write_text(built.layers + "\n", encoding="utf-8")


def _build(
    trt: Any, logger: Any, model: Path, timing_cache: Path, batches: tuple[int, int, int]
) -> bytes:
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network.name = model.name  # all that a plan can carry of its origin
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.read_bytes()):
        faults = "; ".join(_parser_fault(parser.get_error(i)) for i in range(parser.num_errors))
        reason = faults or "no reason given"
        raise ExportError(f"TensorRT {trt.__version__} cannot parse {model.name}: {reason}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector has no types otherwise
    _add_profile(builder, config, batches)
    _read_timing_cache(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(
            f"TensorRT {trt.__version__} built no engine of {model.name}; its own messages above say why"
        )
    cache = config.get_timing_cache()
    if cache is not None:
        _replace(timing_cache, bytes(cache.serialize()))
    return bytes(plan)


def _parser_fault(error: Any) -> str:
    return f"node {error.node_name() or error.node()} ({error.node_operator()}): {error.desc()}"


def _add_profile(builder: Any, config: Any, batches: tuple[int, int, int]) -> None:
    shapes = [(size, CROP_SIZE, CROP_SIZE, CHANNELS) for size in batches]
    profile = builder.create_optimization_profile()
    try:
        profile.set_shape(INPUT_NAME, *shapes)
        index = config.add_optimization_profile(profile)
    except ValueError as error:
        raise ExportError(f"TensorRT refuses batches of {batches} of {INPUT_NAME}: {error}") from error
    if index < 0:
        raise ExportError(f"TensorRT refuses batches of {batches} of {INPUT_NAME} as a profile")


def _read_timing_cache(config: Any, path: Path) -> None:
    """An unreadable cache, or one of another GPU or version, is left aside: it only costs time."""
    stored = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def check_plan(trt: Any, gpu: Gpu, config_text: str, path: Path) -> None:
    """Raises ExportError where config.pbtxt and an engine disagree on a tensor or on the batches."""
    declared = parse_config(config_text)
    engine = _load(trt, gpu, path)
    types = {"TYPE_UINT8": trt.DataType.UINT8, "TYPE_FP32": trt.DataType.FLOAT}
    name_of = model_config_pb2.DataType.Name
    expected = {
        tensor.name: (types[name_of(tensor.data_type)], (-1, *tensor.dims))
        for tensor in (*declared.input, *declared.output)
    }
    found = {
        name: (engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name)))
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
    }
    if found != expected:
        raise ExportError(f"config.pbtxt declares {expected}, but {path.name} has {found}")
    least, _, largest = (shape[0] for shape in engine.get_tensor_profile_shape(INPUT_NAME, 0))
    if least > 1 or largest < declared.max_batch_size:
        raise ExportError(
            f"{path.name} takes batches of {least} to {largest}, but config.pbtxt allows 1 to "
            f"{declared.max_batch_size}"
        )


def _inspect(trt: Any, engine: Any, batch: int) -> str:
    """Every layer at the largest batch; without a context, what depends on the batch would be left out."""
    context = engine.create_execution_context()
    inspector = engine.create_engine_inspector()
    largest = (batch, CROP_SIZE, CROP_SIZE, CHANNELS)
    if context is None or not context.set_input_shape(INPUT_NAME, largest):
        raise ExportError(f"the engine takes no batch of {batch}")
    inspector.execution_context = context
    information: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return information


def check_layers(information: str) -> dict[str, int]:
    """The inspector's JSON -> how many layers there are of each type.

    Raises ExportError where a convolution or matrix product reads FP32, where its types are not
    told, or where there is none: then nothing is proven. What it writes may be FP32: TensorRT lets a
    layer write the float32 island that follows.
    """
    try:
        layers = [layer for layer in json.loads(information)["Layers"] if isinstance(layer, dict)]
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"the engine inspector's answer cannot be read: {information[:200]!r}") from error
    products = [layer for layer in layers if _MATRIX_LAYER.search(_kind(layer))]
    if not products:
        kinds = ", ".join(sorted({_kind(layer) for layer in layers})) or "none with its types"
        raise ExportError(f"no convolution among the engine's layers, so its precision is unknown: {kinds}")
    for layer in products:
        types = _types(layer)
        if _SINGLE.search(types) or not _HALF.search(types):
            raise ExportError(f"{layer.get('Name')} of the engine is not FP16: it reads {types or 'nothing'}")
    return dict(Counter(str(layer.get("LayerType")) for layer in layers))


def _kind(layer: dict[str, Any]) -> str:
    return f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}".strip()


def _types(layer: dict[str, Any]) -> str:
    """The types of what a layer reads: its inputs, and its weights.

    TensorRT 10 writes them as "Format/Datatype", 11 as "Format" and "DataType"; weights have a "Type".
    """
    read = [*layer.get("Inputs", []), layer.get("Weights")]
    return ", ".join(
        str(value)
        for tensor in read
        if isinstance(tensor, dict)
        for key, value in tensor.items()
        if re.search("type|format", key, re.IGNORECASE)
    )


@dataclass(frozen=True)
class LoadedEngine:
    """A plan that runs on tensors of its own device, on torch's current stream."""

    name: str
    context: Any
    classes: int
    stream: Callable[[], int]

    def run(self, images: Tensor, answers: Tensor) -> None:
        """uint8 [N, 224, 224, 3] -> float32 [N, classes], perhaps under way still when this returns."""
        context, batch = self.context, len(images)
        if not context.set_input_shape(INPUT_NAME, tuple(images.shape)):
            raise ExportError(f"{self.name}: a batch of {batch} is outside its profile")
        context.set_tensor_address(INPUT_NAME, images.data_ptr())
        context.set_tensor_address(OUTPUT_NAME, answers.data_ptr())
        if not context.execute_async_v3(self.stream()):
            raise ExportError(f"{self.name}: a batch of {batch} fails")


def load_engine(trt: Any, gpu: Gpu, plan: Path) -> LoadedEngine:
    """A plan's file; raises ExportError if it cannot be loaded here."""
    engine = _load(trt, gpu, plan)
    context = engine.create_execution_context()
    if context is None:
        raise ExportError(f"{plan}: no memory on {gpu.name} to run it")
    return LoadedEngine(plan.name, context, engine.get_tensor_shape(OUTPUT_NAME)[-1], gpu.stream)


def engine_predictor(trt: Any, gpu: Gpu, plan: Path) -> Predict:
    """A plan as a function of NumPy arrays; raises ExportError if it cannot be loaded here."""
    loaded = load_engine(trt, gpu, plan)

    def predict(crops: Pixels) -> Probabilities:
        images = torch.from_numpy(np.ascontiguousarray(crops)).to(gpu.device)  # uint8 [N, 224, 224, 3]
        answers = torch.empty(len(crops), loaded.classes, dtype=torch.float32, device=gpu.device)
        loaded.run(images, answers)
        probabilities: Probabilities = answers.cpu().numpy()  # waits for the stream
        return probabilities

    return predict


def _load(trt: Any, gpu: Gpu, plan: Path) -> Any:
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise ExportError(f"{plan}: TensorRT {trt.__version__} cannot load it on {gpu.name}")
    return engine


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
