"""Bytes to crops: every accepted format and mode, and everything that must be refused."""

from __future__ import annotations

import io
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from support import encoded, picture

from serving.contract import Crops
from serving.errors import RequestError, TooManyPixels, UndecodableImage, UnsupportedFormat
from serving.preprocess import ACCEPTED_FORMATS, cut_crops, decode_square, prepare

Array = npt.NDArray[np.uint8]


def reference(image: Image.Image) -> Array:
    """The contract said slowly: whole picture to shorter side 256, then the centre 256x256."""
    image = ImageOps.exif_transpose(image)
    scale = 256 / min(image.size)
    width, height = (max(256, round(side * scale)) for side in image.size)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - 256) // 2, (height - 256) // 2
    return np.asarray(resized.crop((left, top, left + 256, top + 256)))


def distance(a: Array, b: Array) -> float:
    """Mean absolute difference in grey levels, 0..255."""
    return float(np.abs(a.astype(int) - b).mean())


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + body + zlib.crc32(body).to_bytes(4, "big")


# --- crops -----------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_the_ten_crops_are_corners_and_centre_then_their_mirrors(seed: int) -> None:
    square = np.random.default_rng(seed).integers(0, 256, (256, 256, 3), np.uint8)
    crops = cut_crops(square, Crops.TEN)
    assert crops.shape == (10, 224, 224, 3)
    assert crops.dtype == np.uint8
    assert crops.flags.c_contiguous
    for index, (row, column) in enumerate([(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]):
        window = square[row : row + 224, column : column + 224]
        np.testing.assert_array_equal(crops[index], window)
        np.testing.assert_array_equal(crops[index + 5], np.fliplr(window))
    np.testing.assert_array_equal(cut_crops(square, Crops.CENTER), crops[4:5])
    np.testing.assert_array_equal(cut_crops(square, Crops.AUTO), crops)


def test_crops_do_not_share_memory_with_the_picture() -> None:
    square = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    for crops in Crops:
        assert not np.shares_memory(cut_crops(square, crops), square)


# --- sizes, formats, modes -------------------------------------------------------------------------


@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 1000))
@settings(max_examples=40)
def test_any_size_becomes_crops(width: int, height: int, seed: int) -> None:
    data = encoded(picture(seed, width, height), "PNG")
    crops = prepare(data, Crops.TEN)
    assert crops.shape == (10, 224, 224, 3)
    assert crops.dtype == np.uint8


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2000), (256, 256), (255, 257)])
def test_extreme_sizes_become_a_square(size: tuple[int, int]) -> None:
    square = decode_square(encoded(picture(1, *size), "PNG"))
    assert square.shape == (256, 256, 3)
    if size == (1, 1):
        assert (square == square[0, 0]).all()


@given(st.integers(257, 900), st.integers(257, 900), st.integers(0, 1000))
@settings(max_examples=25)
def test_the_square_is_the_resized_picture_s_centre(width: int, height: int, seed: int) -> None:
    image = picture(seed, width, height, noise=3)
    # The slow way rounds the longer side to whole pixels, so windows may be half a pixel apart.
    assert distance(decode_square(encoded(image, "PNG")), reference(image)) < 5


@pytest.mark.parametrize(
    ("image_format", "options", "bound"),
    [
        ("PNG", {}, 0), ("BMP", {}, 0), ("TIFF", {}, 0), ("WEBP", {"lossless": True}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0), ("JPEG", {"quality": 97}, 6),
        ("JPEG", {"quality": 97, "progressive": True}, 6), ("WEBP", {"quality": 95}, 6),
        ("AVIF", {"quality": 95}, 6), ("GIF", {}, 20),
    ],
)  # fmt: skip
def test_every_accepted_format_gives_the_same_picture(
    image_format: str, options: dict[str, object], bound: float
) -> None:
    image = picture(2, 400, 300)
    expected = decode_square(encoded(image, "PNG"))
    got = decode_square(encoded(image, image_format, **options))
    assert distance(got, expected) <= bound
    assert image_format in ACCEPTED_FORMATS


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(400, 300), (301, 400), (256, 256)])
def test_every_exif_orientation_gives_the_upright_picture(orientation: int, size: tuple[int, int]) -> None:
    stored = picture(3, *size)
    exif = stored.getexif()
    exif[0x0112] = orientation
    data = encoded(stored, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert distance(decode_square(data), decode_square(encoded(upright, "PNG"))) < 1


def test_a_damaged_exif_block_does_not_make_the_picture_unreadable() -> None:
    exif = b"Exif\0\0II*\0" + np.random.default_rng(4).bytes(60)
    image = picture(4)
    assert distance(decode_square(encoded(image, exif=exif)), decode_square(encoded(image))) < 1


def test_a_large_jpeg_is_decoded_at_a_smaller_scale_and_looks_the_same() -> None:
    image = picture(5, 2400, 1800)
    data = encoded(image, quality=92)
    opened = Image.open(io.BytesIO(data))
    opened.draft(None, (256, 256))
    assert opened.size == (600, 450)
    tracemalloc.start()
    square = decode_square(data)
    full = decode_square(encoded(Image.open(io.BytesIO(data)), "PNG"))
    tracemalloc.stop()
    assert distance(square, full) < 3


def on_white(rgba: Array) -> Array:
    alpha = rgba[..., 3:].astype(float) / 255
    return (rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def rgba_picture(seed: int) -> Array:
    colours = np.asarray(picture(seed, 256, 256))
    alpha = np.asarray(picture(seed + 1, 256, 256).convert("L"))
    return np.dstack([colours, alpha])


def test_transparency_is_composited_on_white() -> None:
    rgba = rgba_picture(6)
    got = decode_square(encoded(Image.fromarray(rgba), "PNG"))
    assert distance(got, on_white(rgba)) < 1


def test_hidden_colours_of_transparent_pixels_do_not_show() -> None:
    rgba = rgba_picture(8)
    rgba[..., 3] = 0
    assert (decode_square(encoded(Image.fromarray(rgba), "PNG")) == 255).all()
    large = Image.fromarray(rgba).resize((700, 500))
    assert (decode_square(encoded(large, "WEBP", lossless=True)) == 255).all()


def test_grey_with_alpha_and_palettes_with_transparency_are_composited() -> None:
    rgba = rgba_picture(10)
    grey = Image.fromarray(rgba[..., 0])
    grey.putalpha(Image.fromarray(rgba[..., 3]))
    expected = on_white(np.dstack([rgba[..., :1]] * 3 + [rgba[..., 3:]]))
    assert distance(decode_square(encoded(grey, "PNG")), expected) < 1

    palette = picture(11, 256, 256).quantize(16)
    got = decode_square(encoded(palette, "PNG", transparency=3))
    indices = np.asarray(palette)
    assert (got[indices == 3] == 255).all()
    np.testing.assert_array_equal(got[indices != 3], np.asarray(palette.convert("RGB"))[indices != 3])


def test_palette_grey_bilevel_and_cmyk_keep_their_colours() -> None:
    image = picture(12, 256, 256)
    palette = image.quantize(64)
    np.testing.assert_array_equal(decode_square(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    grey = image.convert("L")
    np.testing.assert_array_equal(decode_square(encoded(grey, "PNG"))[..., 1], np.asarray(grey))
    bilevel = image.convert("1")
    np.testing.assert_array_equal(decode_square(encoded(bilevel, "PNG"))[..., 2], np.asarray(bilevel) * 255)
    cmyk = image.convert("CMYK")
    assert distance(decode_square(encoded(cmyk, quality=97)), np.asarray(image)) < 6
    assert distance(decode_square(encoded(cmyk, "TIFF")), np.asarray(image)) < 2


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(image_format: str) -> None:
    grey = np.asarray(picture(13, 256, 256).convert("L"))
    deep = grey.astype(np.uint16) * 257
    square = decode_square(encoded(Image.fromarray(deep), image_format))
    np.testing.assert_array_equal(square[..., 0], grey)


def test_floating_point_pixels_are_refused_with_advice() -> None:
    deep = Image.fromarray(np.random.default_rng(14).random((64, 64)).astype(np.float32))
    with pytest.raises(UndecodableImage, match="8 or 16 bits"):
        decode_square(encoded(deep, "TIFF"))


@pytest.mark.parametrize(
    ("image_format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})]
)
def test_the_first_frame_of_an_animation_counts(image_format: str, options: dict[str, object]) -> None:
    frames = [picture(seed, 256, 256).quantize(32).convert("RGB") for seed in (15, 16, 17)]
    animated = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    assert distance(decode_square(animated), np.asarray(frames[0])) < 8


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", UndecodableImage),
        (b"hello, this is text", UnsupportedFormat),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", UnsupportedFormat),
        (b"%PDF-1.7\n", UnsupportedFormat),
        (b"\0\0\1\0" + bytes(60), UnsupportedFormat),
        (b"\0\0\0\x18ftypheic" + bytes(60), UnsupportedFormat),
        (png_header(100, 100), RequestError),
        (b"\xff\xd8\xff", RequestError),
    ],
)
def test_what_is_no_picture_is_refused_in_words(data: bytes, error: type[RequestError]) -> None:
    with pytest.raises(error) as caught:
        prepare(data, Crops.TEN)
    assert "object at 0x" not in str(caught.value)


def test_a_bomb_is_refused_by_its_header_without_decoding_it() -> None:
    small = Image.new("1", (20_000, 20_000))
    bomb = encoded(small, "PNG")
    del small
    assert len(bomb) < 100_000
    tracemalloc.start()
    with pytest.raises(TooManyPixels, match=r"20000 x 20000 pixels; at most 50,000,000"):
        prepare(bomb, Crops.CENTER)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_the_pixel_cap_holds_for_every_format(image_format: str) -> None:
    data = encoded(picture(18, 120, 101), image_format)
    with pytest.raises(TooManyPixels, match="120 x 101"):
        decode_square(data, max_pixels=120 * 101 - 1)
    decode_square(data, max_pixels=120 * 101)


def answered_or_refused(data: bytes) -> None:
    try:
        square = decode_square(data, max_pixels=4_000_000)
    except RequestError:
        return
    assert square.shape == (256, 256, 3)
    assert square.dtype == np.uint8


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
SMALL = {image_format: encoded(picture(19, 60, 50), image_format) for image_format in FORMATS}


@given(st.sampled_from(FORMATS), st.floats(0, 1))
@settings(max_examples=150)
def test_a_truncated_file_is_answered_or_refused_never_a_crash(image_format: str, share: float) -> None:
    data = SMALL[image_format]
    answered_or_refused(data[: int(share * len(data))])


@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.floats(0, 0.9999), st.integers(0, 255)), min_size=1, max_size=12),
)
@settings(max_examples=250)
def test_a_mutated_file_is_answered_or_refused_never_a_crash(
    image_format: str, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(SMALL[image_format])
    for place, value in changes:
        data[int(place * len(data))] = value
    answered_or_refused(bytes(data))


@given(st.binary(max_size=300), st.sampled_from([data[:16] for data in SMALL.values()]))
@settings(max_examples=100)
def test_garbage_after_a_magic_number_is_refused(garbage: bytes, magic: bytes) -> None:
    answered_or_refused(magic + garbage)


def test_a_half_jpeg_is_refused_rather_than_answered_half_grey() -> None:
    data = encoded(picture(20, 500, 375))
    with pytest.raises(UndecodableImage, match="truncated"):
        decode_square(data[: len(data) // 2])


def test_a_png_whose_text_chunk_explodes_is_refused_or_answered_in_little_memory() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 30_000_000, zip=True)
    data = encoded(picture(21, 50, 50), "PNG", pnginfo=info)
    tracemalloc.start()
    answered_or_refused(data)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_many_threads_decode_as_one_does() -> None:
    files = [encoded(picture(seed, 300 + seed, 280)) for seed in range(24)]
    alone = [prepare(file, Crops.TEN) for file in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda file: prepare(file, Crops.TEN), files))
    np.testing.assert_array_equal(alone, together)
