"""The forms of one network that can be published: how each is written, and how near it must stay."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from export.calibration import Calibration
from export.config import check_file, config_text, tensorrt_config_text
from export.gate import FP16_BOUNDS, FP32_BOUNDS, INT8_BOUNDS, Bounds, onnx_predictor
from export.to_int8 import calibrate, to_int8
from export.to_onnx import ExportError, to_onnx
from export.to_tensorrt import Gpu, build_engine, check_plan, engine_predictor, write_engine
from model.evaluate import Predict
from model.net import AlexNet
from serving.contract import MODEL_FILE
from serving.preprocess import Pixels


class Precision(StrEnum):
    """What the network's arithmetic is done in."""

    FP32 = "fp32"
    INT8 = "int8"
    FP16 = "fp16"


class WriteOnnx(Protocol):
    """`export.to_onnx.to_onnx`, or what stands for it."""

    def __call__(self, net: AlexNet, path: Path, *, half_storage: bool = False) -> None: ...


@dataclass(frozen=True)
class Target:
    """What a form's file is written for: its name in a version, its config.pbtxt, and what runs it."""

    file: str
    config_text: Callable[[str, int, str], str]
    check_file: Callable[[str, Path], None]
    predictor: Callable[[Path], Predict]


ONNX = Target(MODEL_FILE, config_text, check_file, onnx_predictor)


@dataclass(frozen=True)
class Form:
    """`write` makes the file; `facts` go into the version's provenance, what `write` adds to them too."""

    precision: Precision
    write: Callable[[Path], None]
    bounds: Bounds
    facts: dict[str, Any] = field(default_factory=dict)
    target: Target = ONNX

    def model_name(self, name: str) -> str:
        """`alexnet` in FP32, `alexnet_int8` in INT8, `alexnet_fp16` in FP16."""
        return name if self.precision is Precision.FP32 else f"{name}_{self.precision}"


def fp32(net: AlexNet, *, half_storage: bool = False, write: WriteOnnx = to_onnx) -> Form:
    """One FP32 graph; `half_storage` keeps its large weights as FP16."""
    return Form(Precision.FP32, lambda path: write(net, path, half_storage=half_storage), FP32_BOUNDS)


def once(form: Form, file: Path) -> Form:
    """The form, whose file is made at `file` when it is first wanted; it is copied from there."""

    def write(path: Path) -> None:
        if not file.exists():
            form.write(file)
        shutil.copyfile(file, path)

    return replace(form, write=write)


def int8(
    net: AlexNet, crops: Pixels, held_out: Pixels, advance: Callable[[int], None] = lambda _: None
) -> Form:
    """One INT8 graph, calibrated on `crops`, its method chosen on `held_out`.

    Both uint8 [N, 224, 224, 3] of photographs. Raises ExportError where there are too few.
    """
    if len(crops) < 1 or len(held_out) < 1:
        raise ExportError("INT8 is calibrated on photographs, and there are none; give more with --data")
    calibration, figures = calibrate(net, crops, held_out, advance)
    return Form(
        Precision.INT8,
        lambda path: to_int8(net, path, calibration),
        INT8_BOUNDS,
        {"calibration": _facts(calibration, figures, len(crops))},
    )


def fp16(model: Path, facts: Mapping[str, Any], trt: Any, gpu: Gpu) -> Form:
    """The TensorRT engine of an FP16 ONNX file for this machine's GPU.

    `trt`: the bindings. The engine's timing cache lies beside the file.
    """
    known = dict(facts)

    def write(plan: Path) -> None:
        built = build_engine(trt, gpu, model, model.with_suffix(f".{gpu.plan}.timing"))
        known.update(built.facts)
        write_engine(built, plan)

    target = Target(
        gpu.plan,
        tensorrt_config_text,
        lambda config, plan: check_plan(trt, gpu, config, plan),
        lambda plan: engine_predictor(trt, gpu, plan),
    )
    return Form(Precision.FP16, write, FP16_BOUNDS, known, target)


def _facts(calibration: Calibration, figures: dict[str, float], crops: int) -> dict[str, Any]:
    return {
        "crops": crops,
        "method": calibration.method,
        "mean_abs_difference": {method: round(value, 6) for method, value in figures.items()},
    }
