"""The golden images that a version carries: generated pictures, answered by the exported file itself."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import Image

from serving.contract import CHANNELS
from serving.golden import Golden, GoldenImage
from serving.postprocess import Probabilities
from serving.preprocess import Pixels

SIZES: Final = ((320, 256), (256, 300), (448, 336))
"""Width and height: one cut at the sides, one above and below, one scaled down."""

_CELLS: Final = (2, 5, 16)


def golden_images(predict: Callable[[Pixels], Probabilities], tolerance: float) -> Golden:
    """Answers of `predict`: uint8 [10, 224, 224, 3] -> float32 [10, classes]."""
    return Golden(
        tolerance,
        tuple(
            GoldenImage.answered(f"{seed}.png", _png(_picture(seed, *size)), predict)
            for seed, size in enumerate(SIZES, start=1)
        ),
    )


def _picture(seed: int, width: int, height: int) -> Image.Image:
    """Random patches at three scales, in full colour: structure for a network, little for a PNG."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, CHANNELS), np.float32)
    for cells in _CELLS:
        grid = rng.normal(0, 1, (cells, cells, CHANNELS)).astype(np.float32)
        rows, columns = (np.arange(side) * cells // side for side in (height, width))
        total += grid[rows][:, columns]
    levels = (127.5 + 60 * total / total.std()).clip(0, 255)
    return Image.fromarray(levels.astype(np.uint8))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
