"""An uploaded file becomes a picture: bytes -> RGB, upright, its shorter side as long as it is wanted.

Needs Pillow only, so that a decoder's process has little else in memory. The work is ordered by cost: the
header is checked before any pixel is decoded, a JPEG is decoded at the smallest of its DCT scales that
still covers the square, and everything that commutes with the resize (orientation, compositing) happens on
256x256 pixels.
"""

from __future__ import annotations

import io
import math
import sys
import warnings
from collections.abc import Callable
from typing import Final

from PIL import Image, ImageChops, ImageFile, TiffImagePlugin, UnidentifiedImageError

from serving.contract import RESIZE_SIZE
from serving.errors import RequestError, TooManyPixels, UndecodableImage, UnsupportedFormat

ACCEPTED_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

DEFAULT_MAX_PIXELS: Final = 50_000_000
"""A 48-megapixel phone camera fits. Decoding takes up to 16 bytes a pixel (WebP; RGBA 8, RGB and
progressive JPEG 4, other JPEG nearly none), so 0.8 GB in each decoding process at the worst."""

# Pillow's own reader of uncompressed TIFF takes minutes over 55 kB of overlapping strips, and
# gigabytes for a long list of them; libtiff, which decodes the compressed ones anyway, does not.
TiffImagePlugin.READ_LIBTIFF = True

# Pillow warns about odd metadata, of which we use none but the orientation. One filter for the
# process, because `warnings.catch_warnings` around a decode is not safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

_REPEATABLE: Final = {
    b"\xff\xd8\xff": (b"\xff\xda\x00", b"Exif\0\0"),  # JPEG: scans, EXIF blocks
    b"\x89PNG": (b"iCCP", b"iTXt", b"zTXt"),  # PNG: compressed chunks of up to 1 MB
}
_MAX_REPEATS: Final = 100
"""Parts of one kind in a file, each of which costs Pillow time: a JPEG's every scan is a pass over
all its pixels. Photographs have about ten scans; libtiff stops at 100 in its JPEGs, too."""

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
_TIFF_TILE_TAGS: Final = (0x0142, 0x0143)  # width, length
_PNG_GREY_SCALES: Final = {"L;2": 85, "L;4": 17}
_WHITE: Final = (255, 255, 255, 255)


def square_picture(
    data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS, size: int = RESIZE_SIZE
) -> Image.Image:
    """Encoded image -> its centre square, shorter side resized to `size`: RGB, `size` x `size`.

    The first frame of an animation, upright by its EXIF orientation, transparency on white,
    16-bit grey scaled to 8. Raises UnsupportedFormat, UndecodableImage or TooManyPixels.
    """
    return _decode(data, max_pixels, size, _resize_centre)


def whole_picture(
    data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS, size: int = RESIZE_SIZE
) -> Image.Image:
    """As `square_picture`, but all of it: RGB, the shorter side `size`.

    The longer is even, as `size` is, so that the centre square of the result lies on whole pixels.
    """
    return _decode(data, max_pixels, size, _resize_whole)


def _decode(
    data: bytes, max_pixels: int, size: int, resize: Callable[[Image.Image, int], Image.Image]
) -> Image.Image:
    image = _open(data, max_pixels)
    try:
        picture = _to_resizable(_load(image, size))
        square = _to_rgb(resize(picture, size))
    except (MemoryError, RequestError):
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise _damaged(f"the {image.format} image", error) from error
    transpose = _ORIENTATION_TRANSPOSES.get(_orientation(image))
    return square if transpose is None else square.transpose(transpose)


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Header only: format on the allow-list, size within the cap, no pixel decoded yet."""
    if not data:
        raise UndecodableImage("the image is empty (0 bytes); send the bytes of its file")
    for magic, parts in _REPEATABLE.items():
        if data.startswith(magic) and any(data.count(part) > _MAX_REPEATS for part in parts):
            raise UndecodableImage(f"there are over {_MAX_REPEATS} scans or metadata blocks; save it again")
    # Pillow's own cap stays, because it counts before ours can: opening a GIF may allocate its frame.
    # For a caller who wants more it is raised, and never lowered: other threads decode meanwhile.
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=ACCEPTED_FORMATS)
        width, height = _decoded_size(image)
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"the image has far more than the {max_pixels:,} pixels accepted") from error
    except MemoryError:
        raise
    except Exception as error:
        raise _damaged("the image's header", error) from error
    if width * height > max_pixels:
        raise TooManyPixels(f"the image is {width} x {height} pixels; at most {max_pixels:,} are accepted")
    return image


def _decoded_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Width and height, or those of a TIFF's tiles: libtiff allocates one in full for a tiny image, too."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.size
    width, height = (int(image.tag_v2.get(tag, 0)) for tag in _TIFF_TILE_TAGS)
    return max(image.size, (width, height), key=math.prod)


def _unidentified(data: bytes) -> RequestError:
    """What Pillow cannot open: another format, unless the first bytes are those of an accepted one."""
    for name in ACCEPTED_FORMATS:
        accept = Image.OPEN[name][1]
        is_heic = name == "AVIF" and b"avi" not in data[:64]  # the same container, other brands
        if accept is not None and accept(data[:16]) is True and not is_heic:
            return UndecodableImage(f"the {name} header is damaged or of a rare kind; save as JPEG or PNG")
    accepted = ", ".join(ACCEPTED_FORMATS)
    return UnsupportedFormat(f"the bytes are not an image of an accepted format; send one of {accepted}")


def _damaged(what: str, error: Exception) -> UndecodableImage:
    """Pillow words its OSErrors for people; other exceptions speak of its insides."""
    reason = f" ({error})" if type(error) is OSError else ""
    return UndecodableImage(f"{what} is damaged or incomplete{reason}; save it again, or send another file")


def _load(image: ImageFile.ImageFile, size: int) -> Image.Image:
    """Decode the first frame; a JPEG at 1/2, 1/4 or 1/8 where that still covers `size`."""
    image.draft(None, (size, size))
    tile = image.tile[0] if image.format in ("GIF", "PNG") else None
    image.load()
    if tile is None or tile.extents is None:
        return image
    if tile.extents != (0, 0, *image.size):  # a GIF's frame, smaller than its screen: nothing around it
        screen = Image.new("RGBA", image.size)
        screen.paste(image.crop(tile.extents).convert("RGBA"), tile.extents[:2])
        return screen
    key = image.info.get("transparency")  # left as written by Pillow, which scales the pixels to 8 bits
    if tile.args in _PNG_GREY_SCALES and isinstance(key, int):
        image.info["transparency"] = key * _PNG_GREY_SCALES[tile.args]
    if tile.args == "RGB;16B" and isinstance(key, tuple):
        image.info["transparency"] = tuple(channel >> 8 for channel in key)
    return image


def _orientation(image: Image.Image) -> int:
    """After loading: before, Pillow loads a PNG for it, and a TIFF is yet to be turned by Pillow itself."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001 - a damaged EXIF block does not make the picture unreadable
        return 1


def _to_resizable(image: Image.Image) -> Image.Image:
    """Any decoded mode -> one that Pillow resamples correctly: L, RGB, CMYK, LA or RGBA."""
    if image.mode in ("I", "F"):
        raise UndecodableImage("signed, 32-bit or float pixels have no agreed range; save as 8 or 16 bits")
    if image.mode.startswith("I;16"):
        return _high_bytes(image)
    if "transparency" in image.info or image.mode in ("PA", "La", "RGBa"):
        return image.convert("RGBA")
    if image.mode in ("L", "RGB", "RGBA", "LA", "CMYK"):
        return image
    return image.convert("RGB")  # 1, P, YCbCr, LAB


def _high_bytes(image: Image.Image) -> Image.Image:
    """16-bit grey -> 8 bits, as Pillow does for 16-bit RGB; its convert("L") clips to white instead."""
    big_endian = image.mode == "I;16B" or (image.mode == "I;16N" and sys.byteorder == "big")
    pairs = image.tobytes()
    high, low = (
        Image.frombytes("L", image.size, pairs[which::2])
        for which in ((0, 1) if big_endian else (1, 0))
    )
    key = image.info.get("transparency")
    if isinstance(key, int):
        same = ImageChops.darker(_equal(high, key >> 8), _equal(low, key & 255))
        high.putalpha(ImageChops.invert(same))
    return high


def _equal(image: Image.Image, value: int) -> Image.Image:
    """White where the grey is `value`, black elsewhere."""
    return image.point([255 * (grey == value) for grey in range(256)])


def _resize_centre(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` and the centre square, as one resampling of the centre's box."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


def _resize_whole(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size`, the longer in proportion, to the next even number."""
    scale = size / min(image.size)
    width, height = (max(size, 2 * round(side * scale / 2)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA"):
        white = Image.new("RGBA", image.size, _WHITE)
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")
