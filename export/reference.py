"""An FP16 graph computed as its types say, on a CPU: what ONNX Runtime would hide there.

ONNX Runtime's CPU kernels compute FP16 graphs in FP32 and drop the Casts between, so a file that
overflows on a GPU passes the parity gate. onnx's reference evaluator gives every tensor the type that
the file gives it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_conv

from export.gate import Bounds, generated_crops
from export.to_onnx import ExportError
from model.evaluate import torch_predictor
from model.fold import fold_batch_norm
from model.net import VARIANTS, AlexNet
from serving.contract import CROP_SIZE, INPUT_NAME, OUTPUT_NAME
from serving.preprocess import Pixels

Array = npt.NDArray[Any]

IMAGES: Final = 4
"""Generated crops that are evaluated beside the adversarial ones: each takes about a second."""


@dataclass(frozen=True)
class Reference:
    """What the reference evaluator measured; `largest` is that of any FP16 tensor (65504 is the end)."""

    images: int
    max_abs_difference: float
    largest: float
    largest_at: str


class Conv(op_conv.Conv):
    """onnx's own, its sums in FP32 and rounded once: as tensor cores do it, and 20 times faster."""

    op_domain = ""

    def _run(self, x: Array, *parameters: Any, **attributes: Any) -> tuple[Array]:  # type: ignore[override]
        wide = [each.astype(np.float32) for each in (x, *parameters) if each is not None]
        (sums,) = super()._run(*wide, **attributes)  # type: ignore[no-untyped-call]
        return (sums.astype(x.dtype),)


class LRN(OpRun):
    """In x's type. onnx 1.23's own takes the number of images for that of channels."""

    op_domain = ""

    def _run(self, x: Array, alpha: float, beta: float, bias: float, size: int) -> tuple[Array]:
        beside = size // 2
        squares = np.pad(x * x, ((0, 0), (beside, beside), (0, 0), (0, 0)))
        total = np.zeros_like(x)
        for start in range(size):
            total += squares[:, start : start + x.shape[1]]
        return ((x / (bias + alpha / size * total) ** beta).astype(x.dtype),)


def check_reference(net: AlexNet, path: Path, bounds: Bounds, images: int = IMAGES) -> Reference:
    """Compare the file with `net` on generated and on adversarial crops, one at a time.

    Raises ExportError where a tensor is not finite, or a probability differs by more than the bound.
    """
    crops = np.concatenate([generated_crops(images), adversarial_crops(net)])
    expected = torch_predictor(net)(crops)
    evaluator = ReferenceEvaluator(onnx.load(path), new_ops=[Conv, LRN])
    worst, largest, largest_at = 0.0, 0.0, ""
    for crop, row in zip(crops, expected, strict=True):
        for name, tensor in _evaluate(evaluator, crop[np.newaxis]).items():
            if not np.isfinite(tensor).all():
                raise ExportError(f"{path.name}: {name} overflows {tensor.dtype}; nothing was published")
            if name == OUTPUT_NAME:
                worst = max(worst, float(np.abs(tensor[0] - row).max()))
            if tensor.dtype == np.float16 and float(np.abs(tensor).max()) > largest:
                largest, largest_at = float(np.abs(tensor).max()), name
    allowed = bounds.max_abs_difference
    if allowed is not None and worst > allowed:
        raise ExportError(
            f"{path.name}: computed in its own types, max |dp| is {worst:.2e}, over the bound {allowed:.0e}, "
            f"on {len(crops)} images; nothing was published"
        )
    return Reference(len(crops), worst, largest, largest_at)


def adversarial_crops(net: AlexNet) -> Pixels:
    """Crops that drive conv1 as far as pixels can, uint8 [2, 224, 224, 3].

    A filter's response is largest where each pixel is 255 under a positive weight and 0 under a
    negative one. The first crop shows every filter its largest and its smallest possible input,
    the second one only the input of the filter that responds most.
    """
    net = fold_batch_norm(net)
    conv1 = net.get_submodule("conv1")
    above = conv1.get_parameter("weight").permute(0, 2, 3, 1) > 0
    patterns: Pixels = torch.where(above, 255, 0).to(torch.uint8).numpy()  # [C, k, k, 3]
    every = _tiled(net, np.concatenate([patterns, 255 - patterns]))
    with torch.inference_mode():
        responses = conv1(net.normalise(torch.from_numpy(every[np.newaxis])))  # [1, C, 55, 55]
    most = int(responses.amax(dim=(0, 2, 3)).argmax())
    return np.stack([every, _tiled(net, patterns[[most]])])


def _tiled(net: AlexNet, patterns: Pixels) -> Pixels:
    """A crop of `patterns` [n, k, k, 3] in turn, each where the convolution's window falls exactly."""
    spec = VARIANTS[net.architecture.variant][0]
    step = -(-spec.kernel // spec.stride) * spec.stride
    starts = range(spec.stride - spec.padding, CROP_SIZE - spec.kernel + 1, step)
    crop: Pixels = np.full((CROP_SIZE, CROP_SIZE, patterns.shape[-1]), 127, np.uint8)
    places = [(row, column) for row in starts for column in starts]
    for index, (row, column) in enumerate(places):
        crop[row : row + spec.kernel, column : column + spec.kernel] = patterns[index % len(patterns)]
    return crop


def _evaluate(evaluator: ReferenceEvaluator, crops: Pixels) -> dict[str, Array]:
    """Every tensor of the graph by its name."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = evaluator.run(None, {INPUT_NAME: crops}, intermediate=True)
    assert isinstance(results, dict)
    return {name: tensor for name, tensor in results.items() if tensor is not None}
