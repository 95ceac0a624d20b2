"""The forms of one network that can be published: how each is written, and how near it must stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from export.calibration import Calibration
from export.gate import FP32_BOUNDS, INT8_BOUNDS, Bounds
from export.to_int8 import calibrate, to_int8
from export.to_onnx import ExportError, to_onnx
from model.net import AlexNet
from serving.preprocess import Pixels


class Precision(StrEnum):
    """What the network's arithmetic is done in."""

    FP32 = "fp32"
    INT8 = "int8"


@dataclass(frozen=True)
class Form:
    """`write` makes the file; `facts` go into the version's provenance."""

    precision: Precision
    write: Callable[[Path], None]
    bounds: Bounds
    facts: dict[str, Any] = field(default_factory=dict)

    def model_name(self, name: str) -> str:
        """`alexnet` in FP32, `alexnet_int8` in INT8."""
        return name if self.precision is Precision.FP32 else f"{name}_{self.precision}"


def fp32(net: AlexNet, *, half_storage: bool = False) -> Form:
    """One FP32 graph; `half_storage` keeps its large weights as FP16."""
    return Form(
        Precision.FP32, lambda path: to_onnx(net, path, half_storage=half_storage), FP32_BOUNDS
    )


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


def _facts(calibration: Calibration, figures: dict[str, float], crops: int) -> dict[str, Any]:
    return {
        "crops": crops,
        "method": calibration.method,
        "mean_abs_difference": {method: round(value, 6) for method, value in figures.items()},
    }
