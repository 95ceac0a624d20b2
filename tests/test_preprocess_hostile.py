"""What must be refused, in words and at little cost: other formats, bombs, damage of every kind."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import images
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import bmp, encoded, gif_frame, gif_on_screen, header_announcing, photograph, png_chunk, tiff
from PIL import Image, ImageFile

from serving.contract import Crops
from serving.errors import RequestError, TooManyPixels, UndecodableImage, UnsupportedFormat
from serving.pictures import DEFAULT_MAX_PIXELS
from serving.preprocess import decode_square, prepare

ROOT = Path(__file__).resolve().parent.parent


def refusal(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> RequestError | None:
    """How the file is refused, if it is; the words must be fit for the person who sent it."""
    try:
        square = decode_square(data, max_pixels)
    except (UnsupportedFormat, UndecodableImage, TooManyPixels) as error:
        text = str(error)
        assert re.match(r"(the|there|signed) \w+", text), text
        assert re.search("send|save|accepted", text), text
        assert not re.search(r" at 0x|Errno|NoneType|<|\\x|PIL|/", text), text
        assert len(text) < 250, text
        return error
    assert square.shape == (256, 256, 3) and square.dtype == np.uint8
    return None


# --- other formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"hello, this is text",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<!doctype html><img src='data:image/png;base64,'>",
        b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
        encoded(photograph(0), "PDF"),
        encoded(photograph(0, 64, 64), "ICO"),
        encoded(photograph(0, 64, 64), "TGA"),
        encoded(photograph(0, 64, 64), "PPM"),
        encoded(photograph(0, 64, 64), "PCX"),
        encoded(photograph(0, 64, 64), "JPEG2000"),
        encoded(photograph(0, 64, 64), "EPS"),
        b"8BPS\0\1" + bytes(60),
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60),
        b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(60),
        b"RIFF\x24\0\0\0WAVEfmt " + bytes(60),
        b"PK\3\4" + encoded(photograph(0), "PNG"),
        b"GIF88a" + bytes(60),
        b"\0" + encoded(photograph(0)),
    ],
    ids=lambda data: re.sub(rb"\W", b".", data[:12]).decode(),
)
def test_other_formats_are_unsupported(data: bytes) -> None:
    error = refusal(data)
    assert isinstance(error, UnsupportedFormat)
    assert "accepted format" in str(error) and "JPEG, PNG" in str(error)


def test_an_image_with_another_file_behind_it_is_that_image() -> None:
    image = encoded(photograph(1))
    np.testing.assert_array_equal(decode_square(image + b"PK\3\4" + bytes(500)), decode_square(image))


def test_no_bytes_are_an_empty_image() -> None:
    with pytest.raises(UndecodableImage, match="empty"):
        prepare(b"", Crops.TEN)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_an_accepted_format_with_a_damaged_header_is_undecodable_not_unsupported(image_format: str) -> None:
    for length in (16, 20, 24):
        assert isinstance(refusal(encoded(photograph(2), image_format)[:length]), UndecodableImage)


# --- too many pixels -------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("size", [(8000, 8000), (16_000, 16_000)])
def test_too_many_pixels_are_refused_by_the_header_alone(image_format: str, size: tuple[int, int]) -> None:
    error = refusal(header_announcing(image_format, *size))
    assert isinstance(error, TooManyPixels) and "50,000,000" in str(error)
    if size == (8000, 8000):
        assert "8000 x 8000 pixels" in str(error)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF"])
def test_the_cap_is_exact_for_every_format(image_format: str) -> None:
    data = encoded(photograph(3, 120, 101), image_format)
    with pytest.raises(TooManyPixels, match="120 x 101 pixels; at most 12,119"):
        decode_square(data, max_pixels=120 * 101 - 1)
    decode_square(data, max_pixels=120 * 101)


def test_a_cap_above_pillows_own_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = encoded(photograph(4, 90, 80))
    decode_square(data, max_pixels=7200)
    with pytest.raises(TooManyPixels):
        decode_square(data, max_pixels=500)
    assert Image.MAX_IMAGE_PIXELS == 7200  # raised, never lowered


# --- bombs -----------------------------------------------------------------------------------------


def gif_with_a_huge_frame() -> bytes:
    """Pillow, while opening it, fills a canvas of the frame's size for the second frame."""
    data = bytearray(gif_on_screen(photograph(5, 16, 16).quantize(8), (16, 16), (0, 0), disposal=2))
    data[gif_frame(data) + 5 : gif_frame(data) + 9] = struct.pack("<HH", 65535, 65535)
    return bytes(data)


def tiff_with_a_huge_tile() -> bytes:
    """libtiff allocates 40,000 x 40,000 bytes for an image of 100 x 100."""
    return tiff(
        {
            images.WIDTH: 100, images.HEIGHT: 100, images.BITS: 8, images.COMPRESSION: 8,
            images.PHOTOMETRIC: 1, images.SAMPLES: 1, images.TILE_WIDTH: 40_000,
            images.TILE_HEIGHT: 40_000, images.TILE_OFFSETS: 8, images.TILE_BYTES: 17,
        },
        zlib.compress(bytes(1000)),
    )  # fmt: skip


def tiff_of_overlapping_strips() -> bytes:
    """Pillow's own reader would read each strip a byte at a time, and all 3000 of them: 25 seconds."""
    strips = 3000
    return tiff(
        {
            images.WIDTH: 200, images.HEIGHT: 200, images.BITS: 8, images.COMPRESSION: 1,
            images.PHOTOMETRIC: 1, images.SAMPLES: 1, images.ROWS_PER_STRIP: 100,
            images.STRIP_OFFSETS: range(8, 8 + strips), images.STRIP_BYTES: [20_000] * strips,
        },
        bytes(20_000 + strips),
    )  # fmt: skip


def tiff_of_two_million_strips() -> bytes:
    strips = 2_000_000
    return tiff(
        {
            images.WIDTH: 1, images.HEIGHT: strips, images.BITS: 8, images.COMPRESSION: 1,
            images.PHOTOMETRIC: 1, images.SAMPLES: 1, images.ROWS_PER_STRIP: 1,
            images.STRIP_OFFSETS: [8] * strips, images.STRIP_BYTES: [1] * strips,
        },
        bytes(8),
    )  # fmt: skip


def tiff_whose_tags_share_one_megabyte() -> bytes:
    """5000 tags, each of which claims the same megabyte: 5 GB if all were read."""
    tags = b"".join(struct.pack("<HHLL", 40_000 + tag, 7, 1_000_000, 8) for tag in range(5000))
    directory = struct.pack("<H", 5000) + tags + bytes(4)
    return b"II*\0" + struct.pack("<L", 1_000_008) + bytes(1_000_000) + directory


def jpeg_of_many_scans() -> bytes:
    """Each 26-byte scan is one more pass over 12 million pixels."""
    data = encoded(Image.new("L", (4000, 3000)), progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * 3000 + data[-2:]


def jpeg_of_many_exif_blocks() -> bytes:
    """Pillow appends each to the last, copying all that came before."""
    data = encoded(photograph(6, 16, 16))
    return data[:2] + b"\xff\xe1\0\x09Exif\0\0a" * 300_000 + data[2:]


def png_of_many_compressed_chunks(name: bytes, start: bytes) -> bytes:
    """Each kilobyte becomes a megabyte."""
    bomb = png_chunk(name, start + zlib.compress(bytes(1_000_000), 9))
    return images.with_png_chunks(encoded(photograph(7, 16, 16), "PNG"), bomb * 3000)


def png_whose_text_explodes() -> bytes:
    bomb = png_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(100_000_000), 9))
    return images.with_png_chunks(encoded(photograph(8, 16, 16), "PNG"), bomb)


BOMBS: dict[str, Callable[[], bytes]] = {
    "GIF frame": gif_with_a_huge_frame,
    "TIFF tile": tiff_with_a_huge_tile,
    "TIFF overlapping strips": tiff_of_overlapping_strips,
    "TIFF strip list": tiff_of_two_million_strips,
    "TIFF tags": tiff_whose_tags_share_one_megabyte,
    "JPEG scans": jpeg_of_many_scans,
    "JPEG EXIF": jpeg_of_many_exif_blocks,
    "PNG profiles": lambda: png_of_many_compressed_chunks(b"iCCP", b"x\0\0"),
    "PNG texts": lambda: png_of_many_compressed_chunks(b"zTXt", b"\0\0"),
    "PNG text": png_whose_text_explodes,
    "PNG pixels": lambda: encoded(Image.new("1", (20_000, 20_000)), "PNG"),
    "BMP jumps": lambda: bmp(7000, 7000, 8, b"\0\2\xff\xff" * 200, compression=1, palette=bytes(1024)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_answered_or_refused_in_a_second_of_computing(name: str) -> None:
    data = BOMBS[name]()
    started = time.thread_time()
    refusal(data)
    assert time.thread_time() - started < 1


def test_bombs_take_little_memory() -> None:
    """Pillow allocates in C, so a fresh process is asked for its highest resident memory."""
    program = f"""
import resource, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
import test_preprocess_hostile as bombs
bombs.refusal(bombs.encoded(bombs.photograph(0)))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for name, bomb in bombs.BOMBS.items():
    data = bomb()
    before = peak()
    bombs.refusal(data)
    assert peak() - before < 120, (name, before, peak())
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


def test_an_ordinary_number_of_scans_and_chunks_is_fine() -> None:
    progressive = encoded(photograph(9), progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    assert refusal(progressive[:-2] + scan * 50 + progressive[-2:]) is None
    texts = png_chunk(b"iTXt", b"comment\0\0\0\0\0words") * 90
    assert refusal(images.with_png_chunks(encoded(photograph(9), "PNG"), texts)) is None


# --- damage ----------------------------------------------------------------------------------------


def samples() -> dict[str, bytes]:
    """One file of each kind of reader."""
    image = photograph(10, 60, 50)
    rgba = image.copy()
    rgba.putalpha(photograph(11, 60, 50).convert("L"))
    palette, exif = image.quantize(32), Image.Exif()
    exif[0x0112] = 6
    turned = rgba.rotate(90)
    files = {name: encoded(image, name) for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")}
    return files | {
        "progressive JPEG": encoded(image, progressive=True, exif=exif),
        "CMYK JPEG": encoded(image.convert("CMYK")),
        "MPO": encoded(image, "MPO", save_all=True, append_images=[image]),
        "APNG": encoded(rgba, "PNG", save_all=True, append_images=[turned], exif=exif),
        "palette PNG": encoded(palette, "PNG", transparency=bytes(range(0, 256, 8))),
        "animated GIF": encoded(palette, "GIF", save_all=True, append_images=[turned], disposal=2),
        "animated WEBP": encoded(rgba, "WEBP", save_all=True, append_images=[turned], exif=exif),
        "LZW TIFF": encoded(rgba, "TIFF", compression="tiff_lzw", exif=exif),
        "JPEG TIFF": encoded(image, "TIFF", compression="jpeg"),
        "fax TIFF": encoded(image.convert("1"), "TIFF", compression="group4"),
        "big TIFF": encoded(image, "TIFF", big_tiff=True),
    }


SAMPLES = samples()
sample_names = st.sampled_from(sorted(SAMPLES))
places = st.floats(0, 1, exclude_max=True)
words = st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])


@given(sample_names, places)
@settings(max_examples=300)
def test_a_truncated_file_is_answered_or_refused(name: str, share: float) -> None:
    data = SAMPLES[name]
    refusal(data[: int(share * len(data))])


@given(sample_names, st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=12))
@settings(max_examples=500)
def test_flipped_bits_are_answered_or_refused(name: str, flips: list[tuple[float, int]]) -> None:
    data = bytearray(SAMPLES[name])
    for place, bit in flips:
        data[int(place * len(data))] ^= 1 << bit
    refusal(bytes(data))


@given(sample_names, st.lists(st.tuples(st.integers(0, 250), words), min_size=1, max_size=3))
@settings(max_examples=300)
def test_absurd_numbers_in_headers_are_answered_or_refused(
    name: str, changes: list[tuple[int, bytes]]
) -> None:
    data = bytearray(SAMPLES[name])
    for place, word in changes:
        data[place : place + 4] = word
    refusal(bytes(data))


@given(sample_names, places, places)
@settings(max_examples=200)
def test_parts_removed_or_doubled_are_answered_or_refused(name: str, one: float, other: float) -> None:
    data = SAMPLES[name]
    start, end = sorted(int(place * len(data)) for place in (one, other))
    refusal(data[:start] + data[end:])
    refusal(data[:end] + data[start:])


@given(st.binary(max_size=300), sample_names)
@settings(max_examples=200)
def test_garbage_after_the_right_first_bytes_is_answered_or_refused(garbage: bytes, name: str) -> None:
    refusal(SAMPLES[name][:16] + garbage)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_half_a_picture_is_refused_rather_than_answered_half_grey(image_format: str, share: float) -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False  # Pillow's default, on which this rests
    data = encoded(photograph(12, 500, 375), image_format)
    assert isinstance(refusal(data[: int(share * len(data))]), UndecodableImage)


def test_a_truncated_jpeg_is_called_truncated() -> None:
    for progressive in (False, True):
        data = encoded(photograph(13, 500, 375), progressive=progressive)
        with pytest.raises(UndecodableImage, match="image file is truncated"):
            decode_square(data[: len(data) // 2])


@given(st.floats(0.2, 0.95))
@settings(max_examples=30)
def test_a_png_whose_pixels_are_damaged_is_refused(place: float) -> None:
    data = bytearray(encoded(photograph(14), "PNG"))
    start = int(place * len(data))
    data[start : start + 64] = bytes(64)
    assert isinstance(refusal(bytes(data)), UndecodableImage)


def test_threads_refuse_and_answer_side_by_side() -> None:
    good, bad = SAMPLES["progressive JPEG"], SAMPLES["PNG"][:300]
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(refusal, [good, bad] * 40))
    assert [type(outcome) for outcome in outcomes] == [type(None), UndecodableImage] * 40
