"""When two crops are enough: the margin from which `crops=auto` leaves the other eight out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from model.data import Decoded, Integers
from model.evaluate import Predict, Probabilities, each_crop
from serving.contract import CENTRE, CENTRE_MIRRORED, Crops
from serving.postprocess import margin

MARGINS: Final = tuple(round(0.05 * step, 2) for step in range(20))
MAX_CHANGED: Final = 0.0
"""Share of the training photographs whose first label the shortcut may change: none, since the network is
surer of photographs that trained it than of others, of which a few may change for it."""

IMAGES: Final = 1000


@dataclass(frozen=True)
class Auto:
    """What `crops=auto` does at a margin: the mean number of crops, and the share of first labels changed."""

    margin: float
    images: int
    mean_crops: float
    changed: float


def choose(predict: Predict, training: Decoded, advance: Callable[[int], None] = lambda _: None) -> Auto:
    """The least margin that keeps to MAX_CHANGED on photographs that trained the network."""
    curve = auto_curve(ten_crops(predict, training, advance))
    return next((point for point in curve if point.changed <= MAX_CHANGED), curve[-1])


def ten_crops(
    predict: Predict, data: Decoded, advance: Callable[[int], None] = lambda _: None
) -> Probabilities:
    """The probabilities of each image's ten crops, float [N, 10, classes]."""
    found = []
    for _, each in each_crop(predict, data, Crops.TEN):
        found.append(each)
        advance(len(each))
    return np.concatenate(found)


def auto_curve(each: Probabilities) -> list[Auto]:
    """each float [N, 10, classes] -> what each of MARGINS would have done."""
    two, ten = each[:, [CENTRE, CENTRE_MIRRORED]].mean(axis=1), each.mean(axis=1)
    margins = np.array([margin(row) for row in two])
    points = []
    for threshold in MARGINS:
        settled = margins >= threshold
        changed = settled & (two.argmax(axis=1) != ten.argmax(axis=1))
        crops = np.where(settled, 2, each.shape[1])
        shares = round(float(crops.mean()), 3), round(float(changed.mean()), 5)
        points.append(Auto(threshold, len(each), *shares))
    return points


def first_labels(each: Probabilities, threshold: float) -> Integers:
    """each float [N, 10, classes] -> what `crops=auto` answers first at a margin, int [N]."""
    two, ten = each[:, [CENTRE, CENTRE_MIRRORED]].mean(axis=1), each.mean(axis=1)
    settled = np.array([margin(row) for row in two]) >= threshold
    first: Integers = np.where(settled, two.argmax(axis=1), ten.argmax(axis=1))
    return first
