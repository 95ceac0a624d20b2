"""The facts every part agrees on, written once.

    images         UINT8  [N, 224, 224, 3]  RGB, NHWC, raw pixels 0..255
    probabilities  FP32   [N, classes]      softmax already applied

Normalisation, the NHWC-to-NCHW transpose and the softmax are inside the network, so nothing
outside it knows a mean or a standard deviation: they stand here because the network and the
documentation need them, and are exported with the weights.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

INPUT_NAME: Final = "images"
OUTPUT_NAME: Final = "probabilities"

RESIZE_SIZE: Final = 256
"""Pixels of the square that a photograph becomes: shorter side 256, centre 256x256."""

CROP_SIZE: Final = 224
"""Pixels of the square that the network sees."""

CHANNELS: Final = 3

MEAN: Final = (123.675, 116.28, 103.53)
"""Mean of R, G and B over ILSVRC's training images, in pixel units 0..255."""

STD: Final = (58.395, 57.12, 57.375)
"""Standard deviation of R, G and B over ILSVRC's training images, in pixel units 0..255."""

MAX_BATCH: Final = 80
"""Crops in one inference of a model server: eight photographs of ten crops. On a CPU larger batches gain
nothing and cost memory (full width, two cores: 10 crops 8.6 ms each in 0.4 GB, 80 crops 8.5 ms in
0.9 GB, 160 crops 10.6 ms in 1.4 GB, 640 crops 22 ms in 4.6 GB)."""

MODEL_FILE: Final = "model.onnx"
SQUARE_FILE: Final = "square.onnx"
"""Of the embedded engine, beside model.onnx: the same network, which also takes the square that ten crops
are cut from, uint8 [1, 256, 256, 3] -> [10, classes], and computes once what the crops share."""
PLAN_SUFFIX: Final = ".plan"
"""Of TensorRT engines, one file for each kind of GPU."""
LABELS_FILE: Final = "labels.txt"
CONFIG_FILE: Final = "config.pbtxt"
PROVENANCE_FILE: Final = "provenance.json"


class Crops(StrEnum):
    """How many views of a photograph the network sees (section 4.1 of the paper)."""

    CENTER = "center"
    TEN = "ten"
    AUTO = "auto"
    """The centre and its mirror image; the other eight only where those two do not settle it."""


CROP_COUNT: Final = {Crops.CENTER: 1, Crops.TEN: 10, Crops.AUTO: 10}
"""Crops that are cut, and at most seen, for one photograph."""

_EDGE: Final = RESIZE_SIZE - CROP_SIZE
CROP_OFFSETS: Final = {
    "top left": (0, 0),
    "top right": (0, _EDGE),
    "bottom left": (_EDGE, 0),
    "bottom right": (_EDGE, _EDGE),
    "centre": (_EDGE // 2, _EDGE // 2),
}
"""Row and column, in pixels, of the five 224x224 windows in the 256x256 square. The ten crops
are these five in this order, then their mirror images in the same order."""

VIEWS: Final = tuple((name, mirrored) for mirrored in (False, True) for name in CROP_OFFSETS)
"""The ten crops: which window, and whether mirrored."""

CENTRE: Final = VIEWS.index(("centre", False))
CENTRE_MIRRORED: Final = VIEWS.index(("centre", True))
