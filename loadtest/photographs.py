"""The photographs that load tests send: a folder's, or generated ones with a camera's sizes and textures."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MOST = 200
GENERATED = 24

PHOTOGRAPH = (500, 375)
"""The median size of ILSVRC's photographs."""

SIZES: tuple[tuple[tuple[int, int], float], ...] = (
    ((224, 224), 0.05),  # thumbnails
    ((500, 375), 0.50),  # what websites show
    ((1024, 768), 0.20),
    ((1920, 1080), 0.15),
    ((4032, 3024), 0.10),  # as a phone takes them
)
"""Width, height, and how many of all uploads have it; a third of them stand upright."""
UPRIGHT = 1 / 3

CROPS = {"ten": 0.7, "auto": 0.2, "center": 0.1}
"""How often each of `?crops=` is asked for."""


def given_folder(folder: Path | None) -> Path | None:
    """The folder that was asked for: by flag, or by ALEXNET_IMAGES."""
    named = os.environ.get("ALEXNET_IMAGES")
    return folder if folder is not None else Path(named) if named else None


def from_folder(folder: Path, most: int = MOST) -> list[bytes]:
    """Up to `most` files, spread evenly over the folder and everything below; raises SystemExit if none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"{folder} holds no photographs ({', '.join(sorted(SUFFIXES))})")
    chosen = np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int)
    return [paths[index].read_bytes() for index in chosen]


def photograph(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """RGB of (width, height): light that changes smoothly, textures at three scales, a sensor's noise.

    The spectrum falls with frequency as a photograph's does, so that JPEG needs about the bytes, and
    its decoder the time, of a real one; flat colour or white noise would be far from either.
    """
    width, height = size
    pixels = rng.normal(128, 5, (height, width, 3))
    for cells, contrast in ((4, 50), (16, 30), (64, 16)):
        waves = rng.normal(128, contrast, (cells * 3 // 4, cells, 3)).clip(0, 255).astype(np.uint8)
        layer = Image.fromarray(waves).resize(size, Image.Resampling.BICUBIC)
        pixels += np.asarray(layer, np.float64) - 128
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int = 88) -> bytes:
    """As a camera's file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def generated(count: int = GENERATED, size: tuple[int, int] = PHOTOGRAPH, seed: int = 0) -> list[bytes]:
    """JPEG files of one size, the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    return [jpeg(photograph(rng, size)) for _ in range(count)]


def photographs(folder: Path | None) -> list[bytes]:
    """The folder's, or generated ones of 500x375."""
    return generated() if folder is None else from_folder(folder)


def sizes(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """As many (width, height) as asked for, in SIZES' proportions to within one, shuffled."""
    rng = np.random.default_rng(seed)
    shares = np.cumsum([share for _, share in SIZES])
    at = (np.arange(count) + 0.5) / max(count, 1) * shares[-1]
    chosen = [SIZES[int(index)][0] for index in np.searchsorted(shares, at)]
    upright = rng.random(count) < UPRIGHT
    turned = [(h, w) if up else (w, h) for (w, h), up in zip(chosen, upright, strict=True)]
    return [turned[index] for index in rng.permutation(count)]


def mixed(count: int = GENERATED, seed: int = 0) -> list[bytes]:
    """Generated JPEG files of the sizes that people upload."""
    rng = np.random.default_rng(seed)
    return [jpeg(photograph(rng, size)) for size in sizes(count, seed)]


def resized(files: Sequence[bytes], size: tuple[int, int]) -> list[bytes]:
    """Photographs brought to one size: the largest centre of its proportions, scaled."""
    width, height = size
    done = []
    for file in files:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        scale = min(image.width / width, image.height / height)
        w, h = width * scale, height * scale
        left, top = (image.width - w) / 2, (image.height - h) / 2
        box = (left, top, left + w, top + h)
        done.append(jpeg(image.resize(size, Image.Resampling.BICUBIC, box=box)))
    return done
