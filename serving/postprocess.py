"""Probabilities become an answer: [crops, classes] -> mean -> the top labels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

Probabilities = npt.NDArray[np.float32]

_WORDNET_LINE: Final = re.compile(r"(n\d{8}) (.+)")


@dataclass(frozen=True)
class Label:
    """One class: its WordNet id (or, for classes of your own, the folder's name) and its name."""

    wnid: str
    name: str

    def line(self) -> str:
        """How it stands in labels.txt: `n01440764 tench`, or the name alone."""
        return self.name if self.wnid == self.name else f"{self.wnid} {self.name}"

    @classmethod
    def parse(cls, line: str) -> Label:
        """The inverse of `line`."""
        match = _WORDNET_LINE.fullmatch(line)
        return cls(match[1], match[2]) if match else cls(line, line)


@dataclass(frozen=True)
class Prediction:
    """One of the top labels; `probability` in 0..1."""

    index: int
    wnid: str
    label: str
    probability: float


def read_labels(path: Path) -> tuple[Label, ...]:
    """labels.txt, one line a class in the order of the network's outputs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(Label.parse(line.strip()) for line in lines if line.strip())


def average(probabilities: Probabilities) -> Probabilities:
    """float32 [crops, classes] -> [classes]: the mean of the softmax vectors (section 4.1)."""
    mean: Probabilities = probabilities.mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean


def margin(mean: Probabilities) -> float:
    """How far the likeliest class is ahead of the second, 0..1: what `crops=auto` decides by."""
    second, first = np.partition(mean, -2)[-2:]
    return float(first - second)


def top_predictions(mean: Probabilities, labels: tuple[Label, ...], count: int) -> list[Prediction]:
    """The `count` likeliest classes, likeliest first; equal probabilities in class order."""
    order = np.argsort(-mean, kind="stable")[:count]
    return [predict(mean, labels, int(index)) for index in order]


def predict(mean: Probabilities, labels: tuple[Label, ...], index: int) -> Prediction:
    """One class with its label."""
    label = labels[index]
    return Prediction(index, label.wnid, label.name, float(mean[index]))
