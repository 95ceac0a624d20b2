"""Images become batches: decode, then crop, mirror and colour noise per epoch.

Images are decoded by `serving.preprocess`, so training sees exactly what serving will: the
256x256 centre square, RGB uint8. Every batch is a pure function of (seed, epoch, step), so a
resumed run sees the very batches that an undisturbed one would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.images import DataError as DataError
from model.images import ImageFolder as ImageFolder
from model.images import Images
from model.images import Integers as Integers
from model.images import labels_of as labels_of
from serving.contract import CHANNELS, CROP_SIZE, RESIZE_SIZE
from serving.errors import RequestError
from serving.preprocess import Pixels, decode_square

Floats = npt.NDArray[np.float32]

READ_AT_ONCE: Final = 16

PCA_EIGENVALUES: Final = np.array([0.2175, 0.0188, 0.0045], np.float32)
PCA_EIGENVECTORS: Final = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]], np.float32
)
"""Principal components of RGB over ILSVRC's training pixels, scaled 0..1: the values published
with Krizhevsky's cuda-convnet and used by Torch's ImageNet recipe (fb.resnet.torch)."""


class OnDemand:
    """Squares decoded when they are asked for, where all together would not fit in memory."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def __iter__(self) -> Iterator[Pixels]:
        for row in range(len(self._images)):
            yield self[row]

    def __getitem__(self, key: int | slice | Integers) -> Pixels:
        """uint8 [256, 256, 3] of one number, [n, 256, 256, 3] of several; DataError names a bad file."""
        if isinstance(key, int | np.integer):
            square: Pixels = self[np.array([key])][0]
            return square
        rows = np.arange(len(self._images))[key]
        squares = np.empty((len(rows), RESIZE_SIZE, RESIZE_SIZE, CHANNELS), np.uint8)
        for index, encoded in enumerate(self._images.encoded(rows)):
            squares[index] = _decode(self._images, int(rows[index]), encoded)
        return squares


@dataclass(frozen=True)
class Decoded:
    """A split: squares uint8 [N, 256, 256, 3], in memory or on demand, and targets int64 [N]."""

    squares: Pixels | OnDemand
    targets: Integers

    @classmethod
    def read(
        cls,
        images: Images,
        workers: int,
        advance: Callable[[], None] = lambda: None,
        memory_bytes: float = math.inf,
    ) -> Decoded:
        """Every image decoded once, if that fits; one that cannot be decoded is an error that names it."""
        targets, shape = np.array(images.targets, np.int64), (len(images), RESIZE_SIZE, RESIZE_SIZE, CHANNELS)
        if math.prod(shape) > memory_bytes:
            return cls(OnDemand(images), targets)
        squares = np.empty(shape, np.uint8)

        def read(start: int) -> int:
            rows = np.arange(start, min(start + READ_AT_ONCE, len(images)))
            for row, encoded in zip(rows, images.encoded(rows), strict=True):
                squares[row] = _decode(images, int(row), encoded)
            return len(rows)

        with ThreadPoolExecutor(workers) as pool:
            for count in pool.map(read, range(0, len(images), READ_AT_ONCE)):
                for _ in range(count):
                    advance()
        return cls(squares, targets)

    @property
    def in_memory(self) -> bool:
        return not isinstance(self.squares, OnDemand)


def _decode(images: Images, row: int, encoded: bytes) -> Pixels:
    try:
        return decode_square(encoded)
    except RequestError as error:
        raise DataError(f"{images.name(row)}: {error}") from error


@dataclass(frozen=True)
class Windows:
    """For each image of a batch a square of its 256x256 pixels: int64 [N] each, and bool [N]."""

    side: Integers
    top: Integers
    left: Integers
    mirrored: npt.NDArray[np.bool_]

    def of(self, positions: Integers) -> Windows:
        """Those of some images."""
        return Windows(
            self.side[positions], self.top[positions], self.left[positions], self.mirrored[positions]
        )

    def view(self, square: Pixels, position: int, size: int) -> Pixels:
        """uint8 [256, 256, 3] -> uint8 [size, size, 3]: the window, resized, perhaps mirrored."""
        side, top, left = (int(field[position]) for field in (self.side, self.top, self.left))
        view = square[top : top + side, left : left + side]
        if side != size:
            resized = Image.fromarray(view).resize((size, size), Image.Resampling.BILINEAR)
            view = np.asarray(resized)
        return view[:, ::-1] if self.mirrored[position] else view


@dataclass(frozen=True)
class Augmentation:
    """Random views; `crop_min` 224 is the paper's crop, smaller ones are resized to the target."""

    crop_min: int = 150
    crop_max: int = RESIZE_SIZE
    brightness: float = 0.2
    colour_noise: float = 0.1

    def windows(self, count: int, rng: np.random.Generator) -> Windows:
        """A random square window for each image, mirrored half the time."""
        side = rng.integers(self.crop_min, self.crop_max + 1, count)
        top, left = (rng.integers(0, RESIZE_SIZE - side + 1) for _ in range(2))
        return Windows(side, top, left, rng.random(count) < 0.5)

    def colour(self, count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Factor [N, 1, 1, 1] and offset [N, 1, 1, 3] (pixel units) for each image of a batch.

        The offset is section 4.1's: principal components of RGB times their eigenvalues times
        N(0, 0.1), drawn once per image.
        """
        gain = rng.uniform(1 - self.brightness, 1 + self.brightness, (count, 1, 1, 1))
        drawn = rng.normal(0, self.colour_noise, (count, 3)) * PCA_EIGENVALUES
        offset = 255 * (drawn @ PCA_EIGENVECTORS.T)
        return gain.astype(np.float32), offset.reshape(count, 1, 1, 3).astype(np.float32)


PAPER_AUGMENTATION: Final = Augmentation(crop_min=CROP_SIZE, crop_max=CROP_SIZE, brightness=0.0)


@dataclass(frozen=True)
class Batch:
    """One process's share of a batch; N images, at `positions` of the batch's `count`.

    Views uint8 [N, S, S, 3], or with `windows` squares uint8 [N, 256, 256, 3] that the device is yet
    to cut to `size`; gain [N, 1, 1, 1], offset [N, 1, 1, 3], targets int64 [N].
    """

    views: Pixels
    gain: Floats
    offset: Floats
    targets: Integers
    positions: Integers
    count: int
    size: int
    seed: tuple[int, ...]
    windows: Windows | None = None
    seconds: float = 0.0
    """What it took a thread to make."""


def training_batch(
    data: Decoded,
    augmentation: Augmentation,
    rows: Integers,
    size: int,
    seed: tuple[int, ...],
    positions: Integers | None = None,
    *,
    cut: bool = True,
) -> Batch:
    """The batch of images `rows`, or those at `positions` of it, augmented by `seed` alone.

    The random numbers are drawn for all of `rows`, so that an image gets the same whoever has it.
    Without `cut` the windows are left for the device.
    """
    rng = np.random.default_rng(seed)
    windows = augmentation.windows(len(rows), rng)
    gain, offset = augmentation.colour(len(rows), rng)
    mine = np.arange(len(rows)) if positions is None else positions
    squares = data.squares[rows[mine]]
    rest = (gain[mine], offset[mine], data.targets[rows[mine]], mine, len(rows), size, seed)
    if not cut:
        return Batch(squares, *rest, windows=windows.of(mine))
    views = np.empty((len(mine), size, size, CHANNELS), np.uint8)
    for index, position in enumerate(mine):
        views[index] = windows.view(squares[index], position, size)
    return Batch(views, *rest)


def epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> list[Integers]:
    """A shuffle of 0..count-1 in whole batches; an image left over this time comes next time.

    A data set smaller than one batch is one batch.
    """
    order = np.random.default_rng((seed, epoch)).permutation(count)
    whole = max(1, count // batch_size)
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(whole)]


def prefetched(jobs: Iterable[Callable[[], Batch]], depth: int, workers: int) -> Iterator[Batch]:
    """The results of `jobs` in order, computed up to `depth` ahead in `workers` threads."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[Future[Batch]] = []
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > depth:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
