"""The trainer's own step on a card: `Learner.step`, batch in the host's memory, weights updated."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Final

import numpy as np
import torch
from gpu_card import AbsentError
from gpu_events import Run

from model.config import TrainConfig
from model.data import Batch
from model.distributed import World
from model.learner import Learner
from serving.contract import CHANNELS, CROP_SIZE

BATCH: Final = 128
"""The paper's."""
RATE: Final = 0.001
COMPILED: Final = " compiled"
KINDS: Final = ("fp32", "tf32", "bf16", "bf16" + COMPILED)


def random_batch(count: int, classes: int) -> Batch:
    """Noise, as the loader would hand it over."""
    rng = np.random.default_rng(0)
    return Batch(
        views=rng.integers(0, 256, (count, CROP_SIZE, CROP_SIZE, CHANNELS), np.uint8),
        gain=np.ones((count, 1, 1, 1), np.float32),
        offset=rng.normal(0, 10, (count, 1, 1, CHANNELS)).astype(np.float32),
        targets=rng.integers(0, classes, count),
        positions=np.arange(count),
        count=count,
        size=CROP_SIZE,
        seed=(0,),
    )


def need_triton(find: Callable[[str], object | None] = find_spec) -> None:
    """torch.compile writes a card's kernels in the language of that package; raises AbsentError."""
    if find("triton") is None:
        raise AbsentError("torch.compile needs the package triton, which is not installed")


def learner(
    kind: str, classes: int, batch: int, device: torch.device, low_rank: int | None = None
) -> Learner:
    """The paper's recipe on one device; of `tf32` the caller switches the products."""
    config = TrainConfig.of_recipe(
        "paper",
        data="",
        precision="bf16" if kind.startswith("bf16") else "fp32",
        batch_size=batch,
        compile=kind.endswith(COMPILED),
        low_rank=low_rank,
    )
    made = Learner(config, classes, World(device=device))
    made.net.train()
    return made


def step(made: Learner, batch: Batch) -> Run:
    """One update: upload, forward, backward, SGD."""
    return lambda: made.step(batch, RATE)


def upload(made: Learner, batch: Batch) -> Run:
    """The part of a step before the network: to the card, normalised."""
    return lambda: made.to_device(batch)
