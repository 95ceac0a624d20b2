"""Bytes to crops: sizes, formats, orientation, transparency, depth, colour, animation, threads."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import (
    Array,
    bmp,
    distance,
    encoded,
    gif_on_screen,
    photograph,
    slow_square,
)
from PIL import Image

from serving.contract import Crops
from serving.pictures import ACCEPTED_FORMATS
from serving.preprocess import cut_crops, decode_square, prepare

EXACT: dict[str, dict[str, object]] = {
    "PNG": {},
    "BMP": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
}
"""Formats that store every pixel as it is, and how."""

seeds = st.integers(0, 2**32 - 1)


def noise(seed: int, width: int, height: int) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# --- crops -----------------------------------------------------------------------------------------


@given(seeds)
@settings(max_examples=10)
def test_the_ten_crops_are_corners_and_centre_then_their_mirrors(seed: int) -> None:
    square = noise(seed, 256, 256)
    crops = cut_crops(square, Crops.TEN)
    assert crops.shape == (10, 224, 224, 3) and crops.dtype == np.uint8
    for index, (row, column) in enumerate([(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]):
        window = square[row : row + 224, column : column + 224]
        np.testing.assert_array_equal(crops[index], window)
        np.testing.assert_array_equal(crops[index + 5], np.fliplr(window))


@given(seeds)
@settings(max_examples=5)
def test_the_center_crop_is_the_fifth_of_the_ten_and_auto_cuts_them_all(seed: int) -> None:
    square = noise(seed, 256, 256)
    ten = cut_crops(square, Crops.TEN)
    np.testing.assert_array_equal(cut_crops(square, Crops.CENTER), ten[4:5])
    np.testing.assert_array_equal(cut_crops(square, Crops.AUTO), ten)


@pytest.mark.parametrize("crops", Crops)
def test_crops_are_contiguous_writable_and_apart_from_the_square(crops: Crops) -> None:
    square = noise(0, 256, 256)
    cut = cut_crops(square, crops)
    assert cut.flags.c_contiguous and cut.flags.writeable
    assert not np.shares_memory(cut, square)


def test_prepare_cuts_the_crops_of_the_decoded_square() -> None:
    data = encoded(photograph(1))
    for crops in Crops:
        np.testing.assert_array_equal(prepare(data, crops), cut_crops(decode_square(data), crops))


# --- sizes -----------------------------------------------------------------------------------------


@given(st.integers(1, 2000), st.integers(1, 2000), st.sampled_from(["PNG", "JPEG", "BMP"]))
@settings(max_examples=25)
def test_any_size_becomes_a_contiguous_square(width: int, height: int, image_format: str) -> None:
    image = Image.fromarray(noise(width, 64, 64)).resize((width, height))
    options = {"compress_level": 1} if image_format == "PNG" else {}
    square = decode_square(encoded(image, image_format, **options))
    assert square.shape == (256, 256, 3) and square.dtype == np.uint8
    assert square.flags.c_contiguous and square.flags.writeable


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2000), (20_000, 3), (255, 257)])
def test_extreme_sizes_become_the_square_of_their_centre(size: tuple[int, int]) -> None:
    image = noise(1, *size)
    assert np.abs(decode_square(encoded(Image.fromarray(image), "PNG")) - slow_square(image)).max() <= 1.01


@given(st.integers(1, 700), st.integers(1, 700), seeds)
@settings(max_examples=30)
def test_the_square_is_the_antialiased_centre(width: int, height: int, seed: int) -> None:
    image = noise(seed, width, height)
    square = decode_square(encoded(Image.fromarray(image), "PNG", compress_level=1))
    assert np.abs(square - slow_square(image)).max() <= 1.01


@pytest.mark.parametrize("size", [(1100, 1400), (2600, 1700)])
def test_large_pictures_are_reduced_first_without_visible_difference(size: tuple[int, int]) -> None:
    image = photograph(2, *size, noise=12)
    square = decode_square(encoded(image, "BMP"))
    difference = np.abs(square - slow_square(np.asarray(image)))
    assert difference.mean() < 0.7 and difference.max() < 6


@pytest.mark.parametrize("size", [32, 160, 300])
def test_another_square_size_can_be_asked_for(size: int) -> None:
    image = np.asarray(photograph(3, 500, 375))
    square = decode_square(encoded(Image.fromarray(image), "PNG"), size=size)
    assert square.shape == (size, size, 3)
    assert np.abs(square - slow_square(image, size)).max() <= (1.01 if size > 100 else 6)


# --- formats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", EXACT)
@pytest.mark.parametrize("size", [(256, 256), (400, 300), (90, 121)])
def test_lossless_formats_keep_every_pixel(image_format: str, size: tuple[int, int]) -> None:
    image = noise(4, *size)
    square = decode_square(encoded(Image.fromarray(image), image_format, **EXACT[image_format]))
    assert np.abs(square - slow_square(image)).max() <= 1.01
    if size == (256, 256):
        np.testing.assert_array_equal(square, image)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_a_compressed_tiff_keeps_every_pixel(compression: str) -> None:
    image = noise(5, 256, 256)
    square = decode_square(encoded(Image.fromarray(image), "TIFF", compression=compression))
    np.testing.assert_array_equal(square, image)


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("JPEG", {"quality": 95, "subsampling": 0, "restart_marker_rows": 1}),
        ("TIFF", {"quality": 95, "compression": "jpeg"}),
        ("WEBP", {"quality": 95}),
        ("AVIF", {"quality": 95}),
    ],
)
def test_lossy_formats_come_close(image_format: str, options: dict[str, object]) -> None:
    image = photograph(6, 400, 300)
    square = decode_square(encoded(image, image_format, **options))
    assert np.abs(square - slow_square(np.asarray(image))).mean() < 2.5


def test_a_palette_image_is_exact_in_every_format_that_has_palettes() -> None:
    for colours in (2, 4, 16, 200):
        image = photograph(7, 256, 256).quantize(colours)
        for image_format in ("PNG", "GIF", "BMP", "TIFF"):
            square = decode_square(encoded(image, image_format))
            np.testing.assert_array_equal(square, np.asarray(image.convert("RGB")), err_msg=image_format)


def test_every_accepted_format_is_tested_here() -> None:
    assert {*EXACT, "JPEG", "AVIF", "GIF"} == set(ACCEPTED_FORMATS)


@pytest.mark.parametrize("bits", [1, 4, 8, 16, 24, 32])
def test_bmp_of_every_depth_is_read_bottom_up_and_top_down(bits: int) -> None:
    rng = np.random.default_rng(bits)
    palette = rng.integers(0, 256, (1 << min(bits, 8), 4), np.uint8)  # B, G, R, unused
    if bits <= 8:
        indices = rng.integers(0, len(palette), (256, 256), np.uint8)
        expected = palette[indices][..., 2::-1]
        per_byte = 8 // bits
        shifts = np.arange(per_byte - 1, -1, -1) * bits
        rows = (indices.reshape(256, -1, per_byte) << shifts).sum(axis=2).astype(np.uint8)
    elif bits == 16:
        fives = rng.integers(0, 32, (256, 256, 3), np.uint16)
        expected = (fives * 255 // 31).astype(np.uint8)
        rows = (fives @ np.array([1024, 32, 1], np.uint16)).astype("<u2").view(np.uint8)
    else:
        stored = rng.integers(0, 256, (256, 256, bits // 8), np.uint8)
        expected, rows = stored[..., 2::-1], stored.reshape(256, -1)
    table = palette.tobytes() if bits <= 8 else b""
    top_down = bmp(256, -256, bits, rows.tobytes(), palette=table)
    np.testing.assert_array_equal(decode_square(top_down), expected)
    bottom_up = bmp(256, 256, bits, rows[::-1].tobytes(), palette=table)
    np.testing.assert_array_equal(decode_square(bottom_up), expected)


def test_a_run_length_encoded_bmp_is_read() -> None:
    rng = np.random.default_rng(8)
    palette = rng.integers(0, 256, (256, 4), np.uint8)
    indices = np.repeat(rng.integers(0, 256, (256, 64), np.uint8), 4, axis=1)
    rows = b"".join(b"".join(bytes([4, value]) for value in row[::4]) + b"\0\0" for row in indices[::-1])
    square = decode_square(bmp(256, 256, 8, rows + b"\0\1", compression=1, palette=palette.tobytes()))
    np.testing.assert_array_equal(square, palette[indices][..., 2::-1])


# --- large JPEGs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "scaled", "progressive"),
    [
        ((600, 800), (300, 400), False),
        ((1600, 1200), (400, 300), False),
        ((1600, 1200), (400, 300), True),
        ((2048, 2100), (256, 263), False),
    ],
)
def test_a_large_jpeg_is_decoded_at_a_smaller_scale_and_looks_the_same(
    size: tuple[int, int], scaled: tuple[int, int], progressive: bool
) -> None:
    image = photograph(9, *size, noise=8)
    data = encoded(image, quality=92, progressive=progressive)
    square = decode_square(data)
    small = Image.open(io.BytesIO(data))
    small.draft(None, (256, 256))
    assert small.size == scaled
    assert np.abs(square - slow_square(np.asarray(small))).max() <= 1.01
    whole = slow_square(np.asarray(Image.open(io.BytesIO(data))))
    assert np.abs(square - whole).max() > 1.01  # so the smaller scale it was
    assert np.abs(square - whole).mean() < 1.5


# --- orientation -----------------------------------------------------------------------------------

STORED_AS = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
"""EXIF orientation -> how the camera stores the upright picture."""


def turned(upright: Array, orientation: int) -> tuple[Image.Image, Image.Exif]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](upright))), exif


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("size", [(256, 256), (301, 400), (640, 301)])
def test_every_exif_orientation_gives_the_upright_picture(
    orientation: int, image_format: str, size: tuple[int, int]
) -> None:
    upright = noise(10, *size)
    stored, exif = turned(upright, orientation)
    data = encoded(stored, image_format, exif=exif, **EXACT[image_format])
    assert np.abs(decode_square(data) - slow_square(upright)).max() <= 1.01


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize(
    ("image_format", "size", "options"),
    [
        ("JPEG", (900, 640), {"quality": 95}),
        ("MPO", (900, 640), {"quality": 95, "save_all": True, "append_images": [photograph(0)]}),
        ("WEBP", (400, 301), {"quality": 95, "method": 0}),
        ("AVIF", (400, 301), {"quality": 95, "speed": 10}),
        ("TIFF", (400, 301), {"compression": "tiff_lzw"}),
    ],
)
def test_photographs_are_upright_in_every_format(
    orientation: int, image_format: str, size: tuple[int, int], options: dict[str, object]
) -> None:
    upright = np.asarray(photograph(11, *size))
    stored, exif = turned(upright, orientation)
    square = decode_square(encoded(stored, image_format, exif=exif, **options))
    assert np.abs(square - slow_square(upright)).mean() < 2.5


@given(st.binary(max_size=200), st.sampled_from(["JPEG", "PNG", "WEBP"]))
@settings(max_examples=60)
def test_a_damaged_exif_block_is_ignored(damage: bytes, image_format: str) -> None:
    image = photograph(12, 64, 64)
    expected = decode_square(encoded(image, image_format))
    for start in (b"Exif\0\0II*\0\x08\0\0\0", b"Exif\0\0MM\0*", b"Exif\0\0"):
        got = decode_square(encoded(image, image_format, exif=start + damage))
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    image = photograph(13)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_square(encoded(image, exif=exif)), decode_square(encoded(image)))


# --- animations and several pictures ---------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_the_first_frame_counts(image_format: str) -> None:
    frames = [photograph(seed, 256, 256).quantize(200).convert("RGB") for seed in (31, 32, 33)]
    options: dict[str, object] = {"lossless": True} if image_format == "WEBP" else {"quality": 95}
    several = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    near, *far = (distance(decode_square(several), np.asarray(frame)) for frame in frames)
    assert near < 6 and min(far) > 20


@pytest.mark.parametrize("options", [{}, {"transparency": 3}, {"disposal": 2}])
def test_around_a_gif_frame_smaller_than_its_screen_there_is_white(options: dict[str, object]) -> None:
    frame = photograph(34, 120, 100).quantize(16)
    square = decode_square(gif_on_screen(frame, (256, 256), (40, 70), **options))
    expected = np.full((256, 256, 3), 255, np.uint8)
    inside = np.asarray(frame.convert("RGB")).copy()
    if "transparency" in options:
        inside[np.asarray(frame) == 3] = 255
    expected[70:170, 40:160] = inside
    np.testing.assert_array_equal(square, expected)


# --- threads ---------------------------------------------------------------------------------------


def test_eight_threads_decode_as_one_does() -> None:
    formats = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "MPO")
    files = [encoded(photograph(seed, 300 + seed, 280), formats[seed % 8]) for seed in range(16)]
    alone = [decode_square(file) for file in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(decode_square, files * 8))
    np.testing.assert_array_equal(np.stack(alone * 8), np.stack(together))
