"""The parity gate: an exported file answers as the trained network does, or is not published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime

from export.to_onnx import ExportError
from model.evaluate import Accuracy, Predict, Probabilities, torch_predictor
from model.net import AlexNet
from serving.contract import CHANNELS, CROP_SIZE, INPUT_NAME, OUTPUT_NAME
from serving.preprocess import Pixels

BATCH_SIZES: Final = (1, 2, 7, 10, 64)


@dataclass(frozen=True)
class Bounds:
    """What a file may differ from the network in, on each image of the gate.

    `max_abs_difference`: of any probability; None where rounding may move an undecided image far.
    `top1_agreement`: least fraction of images with the same first label.
    `accuracy_drop`: most that top-1 accuracy on validation photographs may fall, as a fraction.
    `golden_tolerance`: most that the file may differ from itself on another machine, in any
    probability of its golden images (`serving.golden`).
    """

    max_abs_difference: float | None
    top1_agreement: float
    accuracy_drop: float
    golden_tolerance: float


FP32_BOUNDS: Final = Bounds(1e-5, 0.95, 0.001, 1e-4)
FP16_BOUNDS: Final = Bounds(5e-3, 0.95, 0.002, 1e-2)
INT8_BOUNDS: Final = Bounds(None, 0.9, 0.005, 0.05)


@dataclass(frozen=True)
class Parity:
    """What the gate measured, and the bounds it held."""

    images: int
    batch_sizes: tuple[int, ...]
    max_abs_difference: float
    mean_abs_difference: float
    top1_agreement: float
    bounds: Bounds


def onnx_predictor(path: Path) -> Predict:
    """An ONNX file as a function of NumPy arrays; raises ExportError if it cannot be opened."""
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"{path}: ONNX Runtime cannot open it: {str(error).splitlines()[0]}") from error

    def predict(crops: Pixels) -> Probabilities:
        try:
            probabilities: Probabilities = session.run([OUTPUT_NAME], {INPUT_NAME: crops})[0]
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ExportError(f"{path.name}: a batch of {len(crops)} fails: {reason}") from error
        return probabilities

    return predict


def generated_crops(count: int, seed: int = 0) -> Pixels:
    """Picture-like crops, uint8 [count, 224, 224, 3]: random blobs at four scales, full range.

    Plain noise would not do: its crops all look alike to the network, and a wrong channel order
    or normalisation moves its probabilities little.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros((count, CROP_SIZE, CROP_SIZE, CHANNELS), np.float32)
    for cells in (2, 7, 28, 224):
        grid = rng.normal(0, 1, (count, cells, cells, CHANNELS)).astype(np.float32)
        repeat = CROP_SIZE // cells
        total += np.sqrt(repeat) * grid.repeat(repeat, axis=1).repeat(repeat, axis=2)
    spread = total.std(axis=(1, 2, 3), keepdims=True)
    crops: Pixels = (127.5 + 60 * total / spread).clip(0, 255).astype(np.uint8)
    return crops


def check_parity(
    net: AlexNet,
    path: Path,
    crops: Pixels,
    bounds: Bounds = FP32_BOUNDS,
    predictor: Callable[[Path], Predict] = onnx_predictor,
) -> Parity:
    """Compare the file, as `predictor` runs it, with the network on `crops` in several batch sizes.

    Raises ExportError with the figure that broke its bound.
    """
    expected = _in_batches(torch_predictor(net), crops, 64)
    predict = predictor(path)
    worst, mean, agreement = 0.0, 0.0, 1.0
    for size in BATCH_SIZES:
        got = _in_batches(predict, crops, size)
        if got.shape != expected.shape:
            raise ExportError(f"batch {size}: the file gives {got.shape}, the network {expected.shape}")
        if not np.isfinite(got).all():
            raise ExportError(f"batch {size}: the file gives probabilities that are not finite")
        worst = max(worst, float(np.abs(got - expected).max()))
        mean = max(mean, float(np.abs(got - expected).mean()))
        agreement = min(agreement, float((got.argmax(1) == expected.argmax(1)).mean()))
    figures = f"max |dp| {worst:.2e}, mean |dp| {mean:.2e}, top-1 agreement {agreement:.1%}"
    allowed = bounds.max_abs_difference
    if allowed is not None and worst > allowed:
        raise _broken(f"max |dp| {worst:.2e} is over the bound {allowed:.0e}", figures, len(crops))
    if agreement < bounds.top1_agreement:
        raise _broken(
            f"top-1 agreement {agreement:.1%} is under the bound {bounds.top1_agreement:.0%}",
            figures,
            len(crops),
        )
    return Parity(len(crops), BATCH_SIZES, worst, mean, agreement, bounds)


def check_accuracy(accuracy: Accuracy, reference: Accuracy, bounds: Bounds) -> None:
    """Both as `model.evaluate.accuracy` gives them; raises ExportError where too much was lost."""
    for figure in ("top1_center", "top1_ten"):
        drop = reference[figure] - accuracy[figure]
        if drop > bounds.accuracy_drop:
            raise ExportError(
                f"parity gate: {figure} fell from {reference[figure]:.2%} to {accuracy[figure]:.2%} on "
                f"{reference['images']:.0f} validation photographs, over the bound of "
                f"{100 * bounds.accuracy_drop:.1f} points; nothing was published"
            )


def _broken(fault: str, figures: str, images: int) -> ExportError:
    return ExportError(f"parity gate: {fault} on {images} images ({figures}); nothing was published")


def _in_batches(predict: Predict, crops: Pixels, size: int) -> Any:
    return np.concatenate([predict(crops[i : i + size]) for i in range(0, len(crops), size)])
