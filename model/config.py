"""Everything that fixes a training run, in one frozen value that is written beside it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from model.net import SMALLEST_SIDE, VARIANTS, Architecture
from serving.contract import CROP_SIZE, RESIZE_SIZE


class TrainError(Exception):
    """Training cannot start or go on; the text says why and what is left to resume from."""


RECIPES: Final[dict[str, dict[str, Any]]] = {
    "modern": {},
    # Section 5 of the paper.
    "paper": dict(
        epochs=90,
        batch_size=128,
        learning_rate=0.01,
        warmup=0.0,
        label_smoothing=0.0,
        crop_min=CROP_SIZE,
        batch_norm=False,
        resolutions=((1.0, CROP_SIZE),),
    ),
    # From a checkpoint, whose batch norm is folded: small steps at full size, larger ones for a new fc8.
    "finetune": dict(
        epochs=16,
        batch_size=32,
        learning_rate=0.002,
        new_layer_rate=10.0,
        gradient_clip=1.0,
        batch_norm=False,
        resolutions=((1.0, CROP_SIZE),),
    ),
}
"""What each recipe changes of TrainConfig's defaults."""


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
    init: str = ""
    """A checkpoint to start from; empty: random weights."""
    low_rank: int | None = None
    """Rank of fc6 and fc7; a run that starts from a checkpoint has the checkpoint's."""
    compile: bool = False
    """torch.compile: minutes at the start and at each new size, faster steps afterwards."""
    new_layer_rate: float = 1.0
    """fc8's learning rate as a multiple of the others'."""

    def __post_init__(self) -> None:
        """Refuse now what would fail, or mean nothing, an epoch later."""
        for right, wrong in (
            (self.recipe in RECIPES, f"no recipe {self.recipe!r}; there are {', '.join(RECIPES)}"),
            (
                bool(self.init) or self.recipe != "finetune",
                "the recipe finetune starts from a checkpoint: give it with --init",
            ),
            (self.variant in VARIANTS, f"no variant {self.variant!r}; there are {', '.join(VARIANTS)}"),
            (
                self.precision in ("auto", "fp32", "bf16"),
                f"no precision {self.precision!r}; there are auto, fp32 and bf16",
            ),
            (self.epochs >= 1, f"epochs: at least 1, not {self.epochs}"),
            (self.validate_every >= 1, f"validate_every: at least 1, not {self.validate_every}"),
            (
                self.batch_size >= (2 if self.batch_norm else 1),
                f"batch_size: at least 1, and 2 with batch norm, not {self.batch_size}",
            ),
            (0 <= self.learning_rate < math.inf, f"learning_rate: 0 or more, not {self.learning_rate}"),
            (
                0 <= self.new_layer_rate < math.inf,
                f"new_layer_rate: 0 or more, not {self.new_layer_rate}",
            ),
            (0 <= self.warmup < 1, f"warmup: a fraction of the epochs below 1, not {self.warmup}"),
            (0 <= self.mixup < math.inf, f"mixup: 0 or more, not {self.mixup}"),
            (1 <= self.crop_min <= RESIZE_SIZE, f"crop_min: 1 to {RESIZE_SIZE} pixels, not {self.crop_min}"),
            (
                all(side >= SMALLEST_SIDE for _, side in self.resolutions),
                f"resolutions: sides of at least {SMALLEST_SIDE} pixels, not {self.resolutions}",
            ),
        ):
            if not right:
                raise TrainError(wrong)

    @classmethod
    def of_recipe(cls, recipe: str, **changes: Any) -> TrainConfig:
        """The defaults are `modern`'s; `RECIPES` holds what the others change."""
        return cls(recipe=recipe, **(RECIPES.get(recipe, {}) | changes))

    def starting_from(self, architecture: Architecture) -> TrainConfig:
        """The same run for a network of the checkpoint's `architecture`, which fixes its shape."""
        return replace(
            self,
            variant=architecture.variant,
            low_rank=architecture.low_rank,
            batch_norm=architecture.batch_norm,
        )

    @classmethod
    def read(cls, path: Path) -> TrainConfig:
        """What a run began with; raises TrainError where `path` is no such file."""
        try:
            values = json.loads(path.read_text())
            known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
            if "resolutions" in known:
                known["resolutions"] = tuple((float(a), int(b)) for a, b in known["resolutions"])
            return cls(**known)
        except (OSError, ValueError, TypeError) as error:
            raise TrainError(f"{path}: not the configuration of a run: {error}") from error

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
