"""Golden images: a version's own pictures, and what it answered to them when it was exported.

    <model>/<version>/golden/golden.json
    <model>/<version>/golden/<name>.png

With them any server can be asked whether it still answers as the version that passed the parity
gate: `alexnet verify` asks one that runs, the gateway asks itself when it loads a version. Decoding,
resizing and cropping are asked with it, since the pictures are files of odd sizes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from serving.contract import CENTRE, Crops
from serving.postprocess import Probabilities, average
from serving.preprocess import Pixels, prepare

GOLDEN_FOLDER: Final = "golden"
_INDEX: Final = "golden.json"
_DIGITS: Final = 7


@dataclass(frozen=True)
class GoldenImage:
    """An encoded picture; `expected` holds float32 [classes] for one crop and for the mean of ten."""

    name: str
    data: bytes
    expected: dict[Crops, Probabilities]

    @classmethod
    def answered(cls, name: str, data: bytes, predict: Callable[[Pixels], Probabilities]) -> GoldenImage:
        """The picture with what `predict` (uint8 [N, 224, 224, 3] -> [N, classes]) says of it now."""
        return cls(name, data, _answers(data, predict))


@dataclass(frozen=True)
class Difference:
    """How far an answer is from the expected one: the largest difference of any probability."""

    image: str
    crops: Crops
    max_abs_difference: float


@dataclass(frozen=True)
class Golden:
    """A version's golden images; `tolerance`: how far a probability may be off on other hardware."""

    tolerance: float
    images: tuple[GoldenImage, ...]

    @classmethod
    def read(cls, version: Path) -> Golden | None:
        """Of a version's folder; None where it has none. Raises OSError or ValueError if damaged."""
        folder = version / GOLDEN_FOLDER
        if not folder.is_dir():
            return None
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        try:
            images = tuple(
                GoldenImage(
                    entry["file"],
                    (folder / entry["file"]).read_bytes(),
                    {crops: np.array(entry[crops], np.float32) for crops in (Crops.CENTER, Crops.TEN)},
                )
                for entry in index["images"]
            )
            return cls(float(index["tolerance"]), images)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{_INDEX} lacks {error}") from error

    def write(self, version: Path) -> None:
        """Into a version's folder that nobody reads yet."""
        folder = version / GOLDEN_FOLDER
        folder.mkdir()
        entries = []
        for image in self.images:
            (folder / image.name).write_bytes(image.data)
            rows = {
                str(crops): [round(float(p), _DIGITS) for p in row] for crops, row in image.expected.items()
            }
            entries.append({"file": image.name, **rows})
        index = json.dumps({"tolerance": self.tolerance, "images": entries})
        (folder / _INDEX).write_text(index + "\n", encoding="utf-8")

    def differences(self, predict: Callable[[Pixels], Probabilities]) -> list[Difference]:
        """Ask a model: `predict` takes uint8 [10, 224, 224, 3] and gives float32 [10, classes]."""
        return [
            Difference(image.name, crops, difference(row, image.expected[crops]))
            for image in self.images
            for crops, row in _answers(image.data, predict).items()
        ]

    def broken(self, found: list[Difference]) -> str | None:
        """What is wrong, in half a sentence; None where every difference is within the tolerance."""
        worst = max(found, key=lambda each: each.max_abs_difference)
        if worst.max_abs_difference <= self.tolerance:
            return None
        return (
            f"golden image {worst.image}, crops={worst.crops}: a probability is off by "
            f"{worst.max_abs_difference:.2g}, at most {self.tolerance:g} is allowed"
        )


def difference(got: Probabilities, expected: Probabilities) -> float:
    """max |dp| of two rows [classes]; infinite where they cannot be compared."""
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - expected).max())


def _answers(data: bytes, predict: Callable[[Pixels], Probabilities]) -> dict[Crops, Probabilities]:
    ten = predict(prepare(data, Crops.TEN))
    return {Crops.CENTER: ten[CENTRE], Crops.TEN: average(ten)}
