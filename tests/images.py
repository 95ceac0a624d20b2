"""Pictures and image files made by hand, with what Pillow cannot write: odd depths, bombs, small frames."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.float64]


def photograph(seed: int, width: int = 320, height: int = 260, noise: float = 4) -> Image.Image:
    """A random RGB picture as a camera might see one: smooth light, texture at three scales, noise."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(0, noise, (height, width, 3)) + 128
    for cells, contrast in ((3, 60), (12, 25), (48, 12)):
        waves = rng.normal(128, contrast, (cells, cells, 3)).clip(0, 255).astype(np.uint8)
        layer = Image.fromarray(waves).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(layer) - 128.0
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    """The picture as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def distance(a: Array, b: Array) -> float:
    """Mean absolute difference in grey levels, 0..255."""
    return float(np.abs(a.astype(int) - b).mean())


def slow_square(pixels: Numbers, size: int = 256) -> Floats:
    """The contract by its definition, [height, width, channels] -> [size, size, channels].

    Shorter side to `size` and the centre, with an antialiased triangle filter, in float64.
    """
    side = min(pixels.shape[:2])
    rows, columns = (_triangle_weights(length, side, size) for length in pixels.shape[:2])
    square: Floats = np.einsum("ij,jkc,lk->ilc", rows, pixels.astype(float), columns, optimize=True)
    return square


def _triangle_weights(length: int, side: int, size: int) -> Floats:
    """[size, length]: how much each input pixel counts for each output pixel."""
    scale = side / size
    centres = (length - side) / 2 + (np.arange(size)[:, np.newaxis] + 0.5) * scale
    reach = max(scale, 1.0)
    weights = (1 - np.abs(np.arange(length) + 0.5 - centres) / reach).clip(0)
    normalised: Floats = weights / weights.sum(axis=1, keepdims=True)
    return normalised


def on_white(rgba: Numbers) -> Floats:
    colours, alpha = rgba[..., :3].astype(float), rgba[..., 3:].astype(float) / 255
    composited: Floats = colours * alpha + 255 * (1 - alpha)
    return composited


# --- PNG -------------------------------------------------------------------------------------------


def png_chunk(name: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG of unfiltered rows, packed as the depth asks; `chunks` stand before the pixels."""
    row_bytes = len(rows) // height
    filtered = b"".join(b"\0" + rows[i * row_bytes : (i + 1) * row_bytes] for i in range(height))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(filtered, 1))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + png_chunk(b"IEND", b"")


def with_png_chunks(data: bytes, chunks: bytes) -> bytes:
    """The PNG with more chunks between its header and the rest."""
    after_header = 8 + 25
    return data[:after_header] + chunks + data[after_header:]


# --- TIFF ------------------------------------------------------------------------------------------

LONG = 4
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
STRIP_OFFSETS, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES = 273, 277, 278, 279
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES, SAMPLE_FORMAT = 322, 323, 324, 325, 339


def tiff(tags: dict[int, Sequence[int] | int], pixels: bytes, order: str = "<") -> bytes:
    """A TIFF from its tags, all written as LONG; pixel data begins at byte 8."""
    body, entries = pixels, b""
    for tag, value in sorted(tags.items()):
        values = [value] if isinstance(value, int) else list(value)
        packed = struct.pack(f"{order}{len(values)}L", *values)
        if len(values) > 1:
            packed, body = struct.pack(f"{order}L", 8 + len(body)), body + packed
        entries += struct.pack(f"{order}HHL", tag, LONG, len(values)) + packed
    magic = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return magic + struct.pack(f"{order}L", 8 + len(body)) + body + directory


def grey_tiff(
    width: int, height: int, bits: int, pixels: bytes, order: str = "<", sample_format: int = 1
) -> bytes:
    tags: dict[int, Sequence[int] | int] = {
        WIDTH: width, HEIGHT: height, BITS: bits, COMPRESSION: 1, PHOTOMETRIC: 1, SAMPLES: 1,
        STRIP_OFFSETS: 8, ROWS_PER_STRIP: height, STRIP_BYTES: len(pixels), SAMPLE_FORMAT: sample_format,
    }  # fmt: skip
    return tiff(tags, pixels, order)


# --- BMP, GIF, JPEG, WebP --------------------------------------------------------------------------


def bmp(
    width: int, height: int, bits: int, pixels: bytes, compression: int = 0, palette: bytes = b""
) -> bytes:
    """A BMP; a negative height stores the top row first."""
    start = 14 + 40 + len(palette)
    info = struct.pack("<LllHHLLllLL", 40, width, height, 1, bits, compression, len(pixels), 0, 0, 0, 0)
    return b"BM" + struct.pack("<LHHL", start + len(pixels), 0, 0, start) + info + palette + pixels


def gif_on_screen(
    frame: Image.Image, screen: tuple[int, int], offset: tuple[int, int], **options: object
) -> bytes:
    """A palette image as the first frame of a larger screen, its corner at `offset` (x, y)."""
    data = bytearray(encoded(frame, "GIF", optimize=False, **options))
    data[6:10] = struct.pack("<HH", *screen)
    start = gif_frame(data)
    data[start + 1 : start + 5] = struct.pack("<HH", *offset)
    return bytes(data)


def gif_frame(data: bytes | bytearray) -> int:
    """Where the first frame's descriptor begins: ',' x y width height."""
    position = 13 + (3 << ((data[10] & 7) + 1))
    while data[position : position + 1] == b"!":
        position += 2
        while data[position]:
            position += 1 + data[position]
        position += 1
    assert data[position : position + 1] == b","
    return position


def jpeg_frame(data: bytes | bytearray) -> int:
    """Where the JPEG's frame header begins: marker, length, bits, height, width."""
    position = 2
    while data[position + 1] not in (0xC0, 0xC1, 0xC2):
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return position


def header_announcing(image_format: str, width: int, height: int) -> bytes:
    """A file whose header announces this size, with the pixels of a tiny picture or none at all."""
    tiny = photograph(0, 16, 16)
    if image_format == "PNG":
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"")
    if image_format == "JPEG":
        data = bytearray(encoded(tiny))
        size = jpeg_frame(data) + 5
        data[size : size + 4] = struct.pack(">HH", height, width)
        return bytes(data)
    if image_format == "GIF":
        return gif_on_screen(tiny.quantize(8), (width, height), (0, 0))
    if image_format == "BMP":
        return bmp(width, height, 24, b"")
    if image_format == "TIFF":
        return grey_tiff(width, height, 8, bytes(16))
    assert image_format == "WEBP"
    data = bytearray(encoded(tiny, "WEBP", save_all=True, append_images=[tiny.rotate(90)]))
    data[24:27] = (width - 1).to_bytes(3, "little")
    data[27:30] = (height - 1).to_bytes(3, "little")
    return bytes(data)
