"""Top-1 and top-5 error over a split, one crop or ten, every image counted once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from model.data import Decoded, Integers
from model.net import AlexNet
from serving.contract import CROP_COUNT, Crops
from serving.preprocess import Pixels, cut_crops

Probabilities = npt.NDArray[np.float32]
Predict = Callable[[Pixels], Probabilities]
"""uint8 [N, 224, 224, 3] -> float32 [N, classes]: the served contract, whatever answers it."""

Accuracy = dict[str, float]
"""images, top1_center, top5_center, top1_ten, top5_ten: a count, and fractions 0..1 of it."""

Doubles = npt.NDArray[np.float64]

IMAGES_AT_ONCE = 8
CALIBRATION_BINS: Final = 15
Z95: Final = 1.959964
"""95 % of a normal distribution lie within so many standard deviations."""


@dataclass(frozen=True)
class Evaluation:
    """Errors are fractions 0..1 of `images`, with their 95 % intervals (Wilson).

    `calibration_error` is the expected one of Guo et al. 2017, 0..1: how far the first label's
    probability is from the share of such answers that are right, over 15 bins of probability.
    """

    images: int
    crops: Crops
    top1_error: float
    top5_error: float
    top1_interval: tuple[float, float]
    top5_interval: tuple[float, float]
    calibration_error: float


@dataclass(frozen=True)
class Tally:
    """What is counted over images: each of its numbers is a sum, so that processes can add theirs."""

    images: float = 0
    wrong1: float = 0
    wrong5: float = 0
    bins: Doubles = field(default_factory=lambda: np.zeros((3, CALIBRATION_BINS)))
    """float64 [3, 15]: images, their probabilities and how many were right, by probability."""

    @classmethod
    def of(cls, mean: Probabilities, targets: Integers) -> Tally:
        """mean float [N, classes], targets int [N]."""
        order = np.argsort(-mean, axis=1, kind="stable")
        finite = np.asarray(np.isfinite(mean).all(axis=1))
        # NaN would pass for the first class.
        hits: npt.NDArray[np.bool_] = (order == targets[:, np.newaxis]) & finite[:, np.newaxis]
        sure = np.where(finite, mean.max(axis=1), 1.0).clip(0, 1)
        bin_of = np.minimum((sure * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        each = (np.ones_like(sure), sure, hits[:, 0])
        bins = np.stack([np.bincount(bin_of, weight, CALIBRATION_BINS) for weight in each]).astype(np.float64)
        return cls(len(targets), int((~hits[:, 0]).sum()), int((~hits[:, :5].any(axis=1)).sum()), bins)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.images + other.images,
            self.wrong1 + other.wrong1,
            self.wrong5 + other.wrong5,
            self.bins + other.bins,
        )

    def over(self, sums: Callable[[npt.ArrayLike], Doubles]) -> Tally:
        """The tally of all processes."""
        total = sums(np.concatenate([[self.images, self.wrong1, self.wrong5], self.bins.ravel()]))
        images, wrong1, wrong5 = total[:3].tolist()
        return Tally(images, wrong1, wrong5, total[3:].reshape(self.bins.shape))

    def evaluation(self, crops: Crops) -> Evaluation:
        """As fractions."""
        count = int(self.images)
        counts, sure, right = self.bins
        return Evaluation(
            count,
            crops,
            self.wrong1 / count,
            self.wrong5 / count,
            wilson(self.wrong1, count),
            wilson(self.wrong5, count),
            float(np.abs(sure - right).sum() / counts.sum()),
        )


def wilson(wrong: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share `wrong / count` (Wilson 1927): sound for few images and none wrong."""
    share, z2 = wrong / count, Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


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
    return tally(predict, data, crops, advance).evaluation(crops)


def tally(
    predict: Predict, data: Decoded, crops: Crops, advance: Callable[[int], None] = lambda _: None
) -> Tally:
    """Each image of `data` counted once; none may be left where other processes have the rest."""
    total = Tally()
    for rows, mean in answers(predict, data, crops):
        total += Tally.of(mean, data.targets[rows])
        advance(len(mean))
    return total


def answers(predict: Predict, data: Decoded, crops: Crops) -> Iterator[tuple[slice, Probabilities]]:
    """Images a few at a time: which, and the mean of their crops' probabilities float [n, classes]."""
    for rows, each in each_crop(predict, data, crops):
        yield rows, each.mean(axis=1)


def each_crop(predict: Predict, data: Decoded, crops: Crops) -> Iterator[tuple[slice, Probabilities]]:
    """Images a few at a time: which, and the probabilities of their crops float [n, crops, classes]."""
    views = CROP_COUNT[crops]
    at_once = max(1, IMAGES_AT_ONCE * 10 // views)
    for start in range(0, len(data.targets), at_once):
        rows = slice(start, start + at_once)
        batch = np.concatenate([cut_crops(square, crops) for square in data.squares[rows]])
        yield rows, predict(batch).reshape(len(batch) // views, views, -1)
