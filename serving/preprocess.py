"""An uploaded file becomes crops: bytes -> RGB uint8 [256, 256, 3] -> uint8 [n, 224, 224, 3].

One definition for training's evaluation, the gateway, the terminal and batch scoring. Needs
NumPy and Pillow only. The work is ordered by cost: the header is checked before any pixel is
decoded, a JPEG is decoded at the smallest of its DCT scales that still covers the square, and
everything that commutes with the resize (orientation, compositing) happens on 256x256 pixels.
"""

from __future__ import annotations

import io
import warnings
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from serving.contract import CROP_COUNT, CROP_OFFSETS, CROP_SIZE, RESIZE_SIZE, Crops
from serving.errors import TooManyPixels, UndecodableImage, UnsupportedFormat

Pixels = npt.NDArray[np.uint8]

ACCEPTED_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

DEFAULT_MAX_PIXELS: Final = 50_000_000
"""A 48-megapixel phone camera fits; decoded, the worst case is 200 MB of RGBA."""

Image.MAX_IMAGE_PIXELS = None  # the cap that counts is ours: checked against the header, told in its words
warnings.filterwarnings("ignore", module=r"PIL\.")  # notes on odd metadata are no one's concern

_ORIENTATION_TAG: Final = 0x0112
_ORIENTATION_TRANSPOSES: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE: Final = (255, 255, 255, 255)


def prepare(data: bytes, crops: Crops, max_pixels: int = DEFAULT_MAX_PIXELS) -> Pixels:
    """Encoded image -> uint8 [10 or 1, 224, 224, 3], the crops in the contract's order.

    Raises UnsupportedFormat, UndecodableImage or TooManyPixels.
    """
    return cut_crops(decode_square(data, max_pixels), crops)


def decode_square(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS, size: int = RESIZE_SIZE) -> Pixels:
    """Encoded image -> its centre square, shorter side resized to `size`: RGB uint8 [size, size, 3].

    The first frame of an animation, upright by its EXIF orientation, transparency on white,
    16-bit grey scaled to 8. Raises UnsupportedFormat, UndecodableImage or TooManyPixels.
    """
    image = _open(data, max_pixels)
    orientation = _orientation(image)
    try:
        image.draft(None, (size, size))
        image.load()
        square = _to_rgb(_resize_centre(_to_resizable(image), size))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise UndecodableImage(f"the {image.format} image cannot be decoded: {error}") from error
    if orientation in _ORIENTATION_TRANSPOSES:
        square = square.transpose(_ORIENTATION_TRANSPOSES[orientation])
    return np.array(square)


def cut_crops(square: Pixels, crops: Crops) -> Pixels:
    """uint8 [256, 256, 3] -> uint8 [1, 224, 224, 3] (center) or [10, 224, 224, 3] (ten).

    Ten: four corners and the centre, then their mirror images in the same order (section 4.1).
    """
    if crops is Crops.CENTER:
        return _window(square, "centre")[np.newaxis].copy()
    out = np.empty((CROP_COUNT[Crops.TEN], CROP_SIZE, CROP_SIZE, square.shape[2]), np.uint8)
    for index, name in enumerate(CROP_OFFSETS):
        window = _window(square, name)
        out[index] = window
        out[index + len(CROP_OFFSETS)] = window[:, ::-1]
    return out


def _window(square: Pixels, name: str) -> Pixels:
    row, column = CROP_OFFSETS[name]
    return square[row : row + CROP_SIZE, column : column + CROP_SIZE]


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Header only: format on the allow-list, size within the cap, no pixel decoded yet."""
    if not data:
        raise UndecodableImage("the image is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=ACCEPTED_FORMATS)
    except UnidentifiedImageError as error:
        accepted = ", ".join(ACCEPTED_FORMATS)
        raise UnsupportedFormat(f"the bytes are not an image of an accepted format ({accepted})") from error
    except MemoryError:
        raise
    except Exception as error:
        raise UndecodableImage(f"the image's header cannot be read: {error}") from error
    if image.width * image.height > max_pixels:
        raise TooManyPixels(_too_many(image.size, max_pixels))
    return image


def _too_many(size: tuple[int, int], max_pixels: int) -> str:
    width, height = size
    return f"the image is {width} x {height} pixels; at most {max_pixels:,} are accepted"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001 - a damaged EXIF block does not make the picture unreadable
        return 1


def _to_resizable(image: Image.Image) -> Image.Image:
    """Any decoded mode -> one that Pillow resamples correctly: L, RGB, CMYK, LA or RGBA."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _scale_to_8_bits(image)
    if "transparency" in image.info or image.mode in ("PA", "La", "RGBa"):
        return image.convert("RGBA")
    if image.mode in ("L", "RGB", "RGBA", "LA", "CMYK"):
        return image
    return image.convert("RGB")  # 1, P, YCbCr, LAB, HSV


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey -> 8-bit; a plain convert("L") clips everything above 255 to white.

    Modes I and F come from 16-bit PGM and from TIFF; the 16-bit range is assumed there.
    """
    if image.mode == "F":
        raise UndecodableImage("floating-point pixels have no defined range; save the image as 8 or 16 bits")
    deep = np.asarray(image).astype(np.int64).clip(0, 65535)
    scaled = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        transparent = image.info["transparency"]
        if isinstance(transparent, int):
            alpha = np.where(deep == transparent, 0, 255).astype(np.uint8)
            scaled.putalpha(Image.fromarray(alpha))
    return scaled


def _resize_centre(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` and the centre square, as one resampling of the centre's box."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA"):
        white = Image.new("RGBA", image.size, _WHITE)
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")
