"""Photographs of a split, with labels, for the commands that measure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from commands.terminal import progress
from commands.wiring import settings_of
from serving.contract import Crops

if TYPE_CHECKING:
    from model.checkpoint import Checkpoint
    from model.data import Decoded, Integers
    from model.images import Images
    from serving.preprocess import Pixels

def images_of(data: Path | str, classes: list[str], split: str) -> Images:
    """The split of `data`, or `data` itself where it has none."""
    from model.images import has_split, open_split

    return open_split(data, split if has_split(data, split) else "", classes)


def decode(data: Path | str, classes: list[str], split: str = "val", count: int | None = None) -> Decoded:
    """Every image of the split, or `count` spread over it."""
    from model.data import Decoded
    from model.machine import memory_bytes

    images = images_of(data, classes, split)
    if count is not None:
        images = images.only(_spread(len(images), count))
    room = memory_bytes() / 2
    with progress("decoding", len(images)) as advance:
        return Decoded.read(images, settings_of({}).decode_workers, lambda: advance(1), room)


def crops_of(data: Path, split: str, checkpoint: Checkpoint, count: int) -> Pixels:
    """The centre crops of `count` images spread over the split, uint8 [count, 224, 224, 3]."""
    import numpy as np

    from serving.preprocess import prepare

    images = images_of(data, [label.wnid for label in checkpoint.labels], split)
    chosen = images.encoded(_spread(len(images), count))
    return np.concatenate([prepare(encoded, Crops.CENTER) for encoded in chosen])


def _spread(present: int, count: int) -> Integers:
    import numpy as np

    return np.linspace(0, present - 1, min(count, present)).astype(np.int64)
