"""What a trained network does on a validation split: counted in one pass, for the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.data import Decoded, Integers
from model.evaluate import Evaluation, Predict, Probabilities, Tally, each_crop
from serving.contract import CENTRE, Crops


@dataclass(frozen=True)
class Findings:
    """N images of C classes; what the centre crop and the mean of ten crops say of each."""

    targets: Integers
    answers: dict[Crops, Integers]
    """int64 [N]: the likeliest class."""
    sureness: dict[Crops, npt.NDArray[np.float64]]
    """float64 [N]: its probability."""
    evaluations: dict[Crops, Evaluation]
    tallies: dict[Crops, Tally]
    classes: int

    def confusion(self, crops: Crops) -> Integers:
        """int64 [C, C]: row the truth, column the answer."""
        counts = np.zeros((self.classes, self.classes), np.int64)
        np.add.at(counts, (self.targets, self.answers[crops]), 1)
        return counts

    def class_accuracy(self, crops: Crops) -> npt.NDArray[np.float64]:
        """float64 [C], 0..1."""
        counts = self.confusion(crops)
        accuracy: npt.NDArray[np.float64] = counts.diagonal() / counts.sum(axis=1).clip(1)
        return accuracy

    def surest_mistakes(self, count: int) -> list[int]:
        """Numbers of the wrong answers of ten crops with the highest probabilities."""
        wrong = np.flatnonzero(self.answers[Crops.TEN] != self.targets)
        order = np.argsort(-self.sureness[Crops.TEN][wrong], kind="stable")
        return [int(row) for row in wrong[order][:count]]

    def changed_by_ten(self) -> tuple[int, int]:
        """Images that only ten crops get right, and that only the centre crop gets right."""
        one, ten = (self.answers[crops] == self.targets for crops in (Crops.CENTER, Crops.TEN))
        return int((ten & ~one).sum()), int((one & ~ten).sum())


def find(predict: Predict, data: Decoded, advance: Callable[[int], None] = lambda _: None) -> Findings:
    """One pass over `data`: the centre crop is one of the ten."""
    count = len(data.targets)
    both = (Crops.CENTER, Crops.TEN)
    answer = {crops: np.zeros(count, np.int64) for crops in both}
    sure = {crops: np.zeros(count) for crops in both}
    tallies = {crops: Tally() for crops in both}
    classes = 0
    for rows, each in each_crop(predict, data, Crops.TEN):
        classes = each.shape[-1]
        for crops, mean in ((Crops.CENTER, each[:, CENTRE]), (Crops.TEN, each.mean(axis=1))):
            _note(answer[crops], sure[crops], rows, mean)
            tallies[crops] += Tally.of(mean, data.targets[rows])
        advance(len(each))
    evaluations = {crops: tallies[crops].evaluation(crops) for crops in both}
    return Findings(data.targets, answer, sure, evaluations, tallies, classes)


def _note(answer: Integers, sure: npt.NDArray[np.float64], rows: slice, mean: Probabilities) -> None:
    answer[rows], sure[rows] = mean.argmax(axis=1), mean.max(axis=1)
