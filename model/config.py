"""Everything that fixes a training run, in one frozen value that is written beside it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from serving.contract import CROP_SIZE


class TrainError(Exception):
    """Training cannot start or go on; the text says why and what is left to resume from."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that fixes a run. Written beside it as config.json."""

    data: str
    recipe: str = "modern"
    variant: str = "2012"
    epochs: int = 34
    batch_size: int = 64
    learning_rate: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    label_smoothing: float = 0.1
    mixup: float = 0.0
    crop_min: int = 128
    gradient_clip: float = 0.0
    batch_norm: bool = True
    resolutions: tuple[tuple[float, int], ...] = ((0.525, 128), (0.76, 160), (0.928, 192), (1.0, CROP_SIZE))
    """Side of the training views until that fraction of the epochs."""
    precision: str = "auto"
    seed: int = 0
    threads: int = 0
    validate_every: int = 3

    @classmethod
    def of_recipe(cls, recipe: str, **changes: Any) -> TrainConfig:
        """`modern`: the defaults. `paper`: section 5 of the paper, without batch norm."""
        if recipe == "paper":
            paper: dict[str, Any] = dict(
                epochs=90,
                batch_size=128,
                learning_rate=0.01,
                warmup=0.0,
                label_smoothing=0.0,
                crop_min=CROP_SIZE,
                batch_norm=False,
                resolutions=((1.0, CROP_SIZE),),
            )
            return cls(recipe=recipe, **(paper | changes))
        if recipe != "modern":
            raise TrainError(f"no recipe {recipe!r}; there are modern and paper")
        return cls(recipe=recipe, **changes)

    @classmethod
    def read(cls, path: Path) -> TrainConfig:
        known = {field.name for field in fields(cls)}
        values = json.loads(path.read_text())
        values["resolutions"] = tuple((float(a), int(b)) for a, b in values["resolutions"])
        return cls(**{name: value for name, value in values.items() if name in known})

    def size_at(self, epoch: int) -> int:
        """Side in pixels of the training views in `epoch`."""
        for until, size in self.resolutions:
            if epoch < until * self.epochs:
                return size
        return CROP_SIZE

    def rate_at(self, progress: float, plateaus: int) -> float:
        """Learning rate: warm-up and cosine over `progress` 0..1, or the paper's division by 10."""
        if self.recipe == "paper":
            return self.learning_rate * 0.1**plateaus
        if progress < self.warmup:
            return self.learning_rate * (0.05 + 0.95 * progress / self.warmup)
        done = (progress - self.warmup) / (1 - self.warmup)
        return self.learning_rate * max(1e-3, 0.5 * (1 + math.cos(math.pi * done)))
