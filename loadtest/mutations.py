"""Damaged images for a fuzz: good files of every accepted format, and what chance makes of them.

A mutation is told by the seed and its number alone, so that any one can be made again. Some know the
format: a PNG's chunks keep their checksums and its pixels their compression, a TIFF's directory and a JPEG's
segments keep their frame, so that the damage gets past the first check.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np
from PIL import Image

Mutation = Callable[[bytes, np.random.Generator], bytes]

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_NUMBERS: Final = (
    0, 1, 2, 7, 8, 16, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1
)  # fmt: skip
_TAGS: Final = (
    254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 322, 323, 324, 325, 338, 339, 530
)  # fmt: skip
"""TIFF's, of the picture's form, strips and tiles."""
_EXIF: Final = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"
_MOST: Final = 4
"""Mutations of one file at most, one upon the other."""

_SAVED: Final[tuple[tuple[str, str, dict[str, Any]], ...]] = (
    ("JPEG", "RGB", {"quality": 80}),
    ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    ("JPEG", "RGB", {"restart_marker_blocks": 3, "exif": _EXIF}),
    ("JPEG", "L", {}), ("JPEG", "CMYK", {}),
    ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "P", {"transparency": 3}), ("PNG", "1", {}),
    ("PNG", "LA", {}), ("PNG", "I;16", {}),
    ("PNG", "RGB", {"save_all": True, "append_images": 2}),
    ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}), ("WEBP", "RGBA", {"quality": 50}),
    ("WEBP", "RGB", {"save_all": True, "append_images": 2}),
    ("GIF", "P", {}), ("GIF", "P", {"transparency": 2}),
    ("GIF", "RGB", {"save_all": True, "append_images": 2}),
    ("BMP", "RGB", {}), ("BMP", "P", {}), ("BMP", "1", {}), ("BMP", "L", {}),
    ("TIFF", "RGB", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "RGB", {"compression": "jpeg"}),
    ("TIFF", "RGBA", {"compression": "tiff_deflate"}), ("TIFF", "1", {"compression": "group4"}),
    ("TIFF", "1", {"compression": "group3"}), ("TIFF", "L", {"compression": "packbits"}),
    ("TIFF", "CMYK", {"compression": "tiff_adobe_deflate"}), ("TIFF", "LAB", {}), ("TIFF", "I;16", {}),
    ("TIFF", "P", {"compression": "tiff_lzw"}), ("TIFF", "RGB", {"save_all": True, "append_images": 1}),
    ("AVIF", "RGB", {"speed": 10}), ("AVIF", "RGBA", {"speed": 10}),
    ("AVIF", "RGB", {"speed": 10, "save_all": True, "append_images": 1}),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One file of a fuzz."""

    number: int
    format: str
    data: bytes


def case(seed: int, number: int) -> Case:
    """The same for the same two numbers; one in fifty is a good file."""
    rng = np.random.default_rng((seed, number))
    originals = good_files()
    image_format, data = originals[int(rng.integers(len(originals)))]
    if rng.random() >= 0.02:
        for _ in range(int(rng.integers(1, _MOST + 1))):
            mutations = _ANY + (_AWARE.get(image_format, ()) * 3 if rng.random() < 0.7 else ())
            data = mutations[int(rng.integers(len(mutations)))](data, rng)
    return Case(number, image_format, data)


@lru_cache(maxsize=1)
def good_files() -> tuple[tuple[str, bytes], ...]:
    """Format and bytes: each format in its modes, compressions and animations, at a few sizes."""
    rng, found = np.random.default_rng(0), []
    for image_format, mode, options in _SAVED:
        for width, height in ((97, 61), (300, 280)):
            image = _picture(rng, mode, width, height)
            given = dict(options)
            if "append_images" in given:
                more = range(given["append_images"])
                given["append_images"] = [_picture(rng, mode, width, height) for _ in more]
            buffer = io.BytesIO()
            image.save(buffer, image_format, **given)
            found.append((image_format, buffer.getvalue()))
    return tuple(found)


def _picture(rng: np.random.Generator, mode: str, width: int, height: int) -> Image.Image:
    channels = {"RGB": 3, "LAB": 3, "P": 3, "1": 1, "L": 1, "I;16": 1}.get(mode, len(mode))
    coarse = rng.integers(0, 256, (6, 8, channels), np.uint8)
    pixels = np.stack(
        [np.asarray(Image.fromarray(coarse[..., i]).resize((width, height))) for i in range(channels)], axis=2
    )
    if mode in ("1", "L"):
        return Image.fromarray(pixels[..., 0]).convert(mode)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode == "P":
        return Image.fromarray(pixels).quantize(32)
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(pixels[..., i]) for i in range(2)])
    return Image.frombytes(mode, (width, height), pixels.tobytes())


# --- of any file ----------------------------------------------------------------------------------


def _place(data: bytes, rng: np.random.Generator) -> int:
    """Half of the time in the head, where most of what is told about the picture stands."""
    reach = min(len(data), 200) if rng.random() < 0.5 else len(data)
    return int(rng.integers(max(1, reach)))


def _bits(data: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 20)) if data else 0):
        damaged[_place(data, rng)] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def _bytes(data: bytes, rng: np.random.Generator) -> bytes:
    at = _place(data, rng)
    noise = rng.bytes(int(rng.integers(1, 9)))
    return data[:at] + noise + data[at + len(noise) :]


def _number(data: bytes, rng: np.random.Generator) -> bytes:
    number = _encoded(rng, "big" if rng.random() < 0.5 else "little")
    at = _place(data, rng)
    return data[:at] + number + data[at + len(number) :]


def _encoded(rng: np.random.Generator, order: Literal["big", "little"]) -> bytes:
    size = 1 << int(rng.integers(3))
    value = _NUMBERS[int(rng.integers(len(_NUMBERS)))]
    return (value % (1 << 8 * size)).to_bytes(size, order)


def _cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(len(data) + 1))]


def _without(data: bytes, rng: np.random.Generator) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + int(rng.integers(1, 100)) :]


def _twice(data: bytes, rng: np.random.Generator) -> bytes:
    start, end = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    return data[:end] + data[start:end] * int(rng.integers(1, 4)) + data[end:]


def _spliced(data: bytes, rng: np.random.Generator) -> bytes:
    others = good_files()
    other = others[int(rng.integers(len(others)))][1]
    return data[: int(rng.integers(len(data) + 1))] + other[int(rng.integers(len(other))) :]


_ANY: Final[tuple[Mutation, ...]] = (_bits, _bits, _bytes, _number, _number, _cut, _without, _twice, _spliced)


def _somehow(data: bytes, rng: np.random.Generator) -> bytes:
    return _ANY[int(rng.integers(len(_ANY)))](data, rng)


# --- that know the format -------------------------------------------------------------------------


def _png_chunks(data: bytes, rng: np.random.Generator) -> bytes:
    """One chunk damaged, left out, repeated or moved; checksums are right, and pixels compressed."""
    chunks, at = [], len(_PNG)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return data
    which = int(rng.integers(len(chunks)))
    name, body = chunks[which]
    deed = rng.random()
    if deed < 0.6:
        chunks[which] = (name, _inflated(body, rng) if name == b"IDAT" else _somehow(body, rng))
    elif deed < 0.7:
        del chunks[which]
    elif deed < 0.8:
        chunks[which:which] = [chunks[which]] * int(rng.integers(1, 50))
    else:
        chunks.insert(int(rng.integers(len(chunks))), chunks.pop(which))
    return _PNG + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def _inflated(body: bytes, rng: np.random.Generator) -> bytes:
    try:
        return zlib.compress(_somehow(zlib.decompress(body), rng), 1)
    except zlib.error:
        return _somehow(body, rng)


def _jpeg_segments(data: bytes, rng: np.random.Generator) -> bytes:
    """One segment before the first scan damaged, left out, repeated or moved; lengths are right."""
    segments, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", data, at + 2)
        segments.append((data[at + 1], data[at + 4 : at + 2 + length]))
        at += 2 + length
    if not segments:
        return data
    which = int(rng.integers(len(segments)))
    marker, body = segments[which]
    deed = rng.random()
    if deed < 0.6:
        segments[which] = (marker, _somehow(body, rng)[:65533])
    elif deed < 0.7:
        del segments[which]
    elif deed < 0.8:
        segments[which:which] = [segments[which]] * int(rng.integers(1, 50))
    else:
        segments.insert(int(rng.integers(len(segments))), segments.pop(which))
    head = b"".join(
        bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body for marker, body in segments
    )
    return data[:2] + head + data[at:]


def _tiff_entry(data: bytes, rng: np.random.Generator) -> bytes:
    """One entry of the first directory: another tag, type, count or value."""
    if len(data) < 8 or data[:2] not in (b"II", b"MM"):
        return data
    order = "<" if data[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(f"{order}I", data, 4)
    if directory + 2 > len(data):
        return data
    (count,) = struct.unpack_from(f"{order}H", data, directory)
    at = directory + 2 + 12 * int(rng.integers(max(1, count)))
    if at + 12 > len(data):
        return data
    entry = list(struct.unpack_from(f"{order}HHII", data, at))
    field = int(rng.integers(4))
    value = entry[field] + int(rng.integers(-9, 10))
    if rng.random() < 0.7:
        options = _TAGS if field == 0 else _NUMBERS
        value = options[int(rng.integers(len(options)))]
    entry[field] = value % (2**16 if field < 2 else 2**32)
    return data[:at] + struct.pack(f"{order}HHII", *entry) + data[at + 12 :]


def _riff_size(data: bytes, rng: np.random.Generator) -> bytes:
    """Damaged anywhere, and the outer size right again."""
    damaged = _somehow(data, rng)
    return damaged[:4] + struct.pack("<I", max(0, len(damaged) - 8)) + damaged[8:]


def _boxes(data: bytes, rng: np.random.Generator) -> bytes:
    """A number in the tables before an AVIF's pixels."""
    at, number = int(rng.integers(max(1, data.find(b"mdat")))), _encoded(rng, "big")
    return data[:at] + number + data[at + len(number) :]


_AWARE: Final[dict[str, tuple[Mutation, ...]]] = {
    "PNG": (_png_chunks,),
    "JPEG": (_jpeg_segments,),
    "TIFF": (_tiff_entry,),
    "WEBP": (_riff_size,),
    "AVIF": (_boxes,),
}
