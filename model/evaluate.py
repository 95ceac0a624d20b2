"""Top-1 and top-5 error over a split, one crop or ten, every image counted once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from model.data import Decoded
from model.net import AlexNet
from serving.contract import CROP_COUNT, Crops
from serving.preprocess import Pixels, cut_crops

Probabilities = npt.NDArray[np.float32]
Predict = Callable[[Pixels], Probabilities]
"""uint8 [N, 224, 224, 3] -> float32 [N, classes]: the served contract, whatever answers it."""

Accuracy = dict[str, float]
"""images, top1_center, top5_center, top1_ten, top5_ten: a count, and fractions 0..1 of it."""

IMAGES_AT_ONCE = 8


@dataclass(frozen=True)
class Evaluation:
    """Errors are fractions 0..1 of `images`."""

    images: int
    crops: Crops
    top1_error: float
    top5_error: float


def evaluate(
    net: AlexNet, data: Decoded, crops: Crops, advance: Callable[[int], None] = lambda _: None
) -> Evaluation:
    """The network in evaluation mode on its own device."""
    return evaluate_predictor(torch_predictor(net), data, crops, advance)


def accuracy(predict: Predict, data: Decoded, advance: Callable[[int], None] = lambda _: None) -> Accuracy:
    """Top-1 and top-5 accuracy, with the centre crop and with ten; `advance` is told of each image twice."""
    figures: Accuracy = {"images": len(data.targets)}
    for crops in (Crops.CENTER, Crops.TEN):
        result = evaluate_predictor(predict, data, crops, advance)
        figures[f"top1_{crops}"] = round(1 - result.top1_error, 4)
        figures[f"top5_{crops}"] = round(1 - result.top5_error, 4)
    return figures


def torch_predictor(net: AlexNet) -> Predict:
    """The network as a function of NumPy arrays."""
    net.eval()
    device = next(net.parameters()).device

    @torch.inference_mode()
    def predict(crops: Pixels) -> Probabilities:
        probabilities: Probabilities = net(torch.from_numpy(crops).to(device)).float().cpu().numpy()
        return probabilities

    return predict


def evaluate_predictor(
    predict: Predict, data: Decoded, crops: Crops, advance: Callable[[int], None] = lambda _: None
) -> Evaluation:
    """Any predictor; the ten crops' probabilities are averaged as in section 4.1."""
    views = CROP_COUNT[crops]
    at_once = max(1, IMAGES_AT_ONCE * 10 // views)
    wrong1 = wrong5 = 0
    for start in range(0, len(data.targets), at_once):
        squares, targets = data.squares[start : start + at_once], data.targets[start : start + at_once]
        batch = np.concatenate([cut_crops(square, crops) for square in squares])
        mean = predict(batch).reshape(len(targets), views, -1).mean(axis=1)
        order = np.argsort(-mean, axis=1, kind="stable")
        hits = order == targets[:, np.newaxis]
        hits &= np.isfinite(mean).all(axis=1, keepdims=True)  # NaN would pass for the first class
        wrong1 += int((~hits[:, 0]).sum())
        wrong5 += int((~hits[:, :5].any(axis=1)).sum())
        advance(len(targets))
    count = len(data.targets)
    return Evaluation(count, crops, wrong1 / count, wrong5 / count)
