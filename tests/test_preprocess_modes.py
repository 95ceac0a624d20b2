"""Bytes to crops: transparency on white, depths scaled to 8 bits, colour models converted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import (
    Array,
    Floats,
    distance,
    encoded,
    grey_tiff,
    on_white,
    photograph,
    png,
    png_chunk,
    slow_square,
)
from PIL import Image

from serving.errors import UndecodableImage
from serving.preprocess import decode_square

# --- transparency ----------------------------------------------------------------------------------


def rgba_picture(seed: int, width: int = 256, height: int = 256) -> Array:
    alpha = photograph(seed + 1, width, height).convert("L").point(lambda v: max(0, min(255, 3 * v - 255)))
    return np.dstack([np.asarray(photograph(seed, width, height)), np.asarray(alpha)])


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
def test_transparency_is_composited_on_white(image_format: str) -> None:
    rgba = rgba_picture(14)
    square = decode_square(encoded(Image.fromarray(rgba), image_format, lossless=True))
    np.testing.assert_allclose(square, on_white(rgba), atol=1.5)


@pytest.mark.parametrize(("width", "height"), [(300, 300), (1100, 1040)])
def test_resizing_weighs_colours_by_their_alpha(width: int, height: int) -> None:
    rgba = rgba_picture(15, width, height)
    square = decode_square(encoded(Image.fromarray(rgba), "PNG", compress_level=1))
    assert np.abs(square - slow_square(on_white(rgba))).max() < 4


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    image = photograph(16, 500, 375)
    opaque = decode_square(encoded(image.convert("RGBA"), "PNG"))
    np.testing.assert_array_equal(opaque, decode_square(encoded(image, "PNG")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
def test_hidden_colours_of_transparent_pixels_do_not_show(mode: str, image_format: str) -> None:
    rgba = rgba_picture(17, 700, 500)
    rgba[..., 3] = 0
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    image = Image.fromarray(rgba).convert("RGBA" if image_format == "WEBP" else mode)
    assert (decode_square(encoded(image, image_format, **options)) == 255).all()


def test_soft_edges_are_not_darkened_by_the_colour_behind_them() -> None:
    y, x = np.mgrid[-1:1:600j, -1:1:600j]
    alpha = (255 * (1.5 - 2 * np.hypot(x, y)).clip(0, 1)).astype(np.uint8)
    white_disc = np.dstack([np.where(alpha > 0, 255, 0).astype(np.uint8)] * 3 + [alpha])
    assert decode_square(encoded(Image.fromarray(white_disc), "PNG")).min() >= 253


def test_grey_with_alpha_is_composited() -> None:
    rgba = rgba_picture(18)
    rgba[..., :3] = rgba[..., :1]
    square = decode_square(encoded(Image.fromarray(rgba).convert("LA"), "PNG"))
    np.testing.assert_allclose(square, on_white(rgba), atol=1.5)


def test_a_palette_entry_can_be_transparent() -> None:
    image = photograph(19, 256, 256).quantize(16)
    indices, colours = np.asarray(image), np.asarray(image.convert("RGB"))
    for image_format in ("PNG", "GIF"):
        square = decode_square(encoded(image, image_format, transparency=3))
        np.testing.assert_array_equal(square, np.where(indices[..., np.newaxis] == 3, 255, colours))


def test_palette_entries_can_have_an_alpha_each() -> None:
    image = photograph(20, 256, 256).quantize(200)
    alphas = np.random.default_rng(20).integers(0, 256, 200, np.uint8)
    rgba = np.dstack([np.asarray(image.convert("RGB")), alphas[np.asarray(image)]])
    square = decode_square(encoded(image, "PNG", transparency=alphas.tobytes()))
    np.testing.assert_allclose(square, on_white(rgba), atol=1.5)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_grey_value_can_be_transparent_at_every_depth(depth: int) -> None:
    rng = np.random.default_rng(depth)
    values = rng.integers(0, 2**depth, (256, 256), np.uint16)
    if depth == 16:
        rows = values.astype(">u2").tobytes()
    else:
        bits = np.unpackbits(values.astype(np.uint8)[..., np.newaxis], axis=2)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(256, -1), axis=1).tobytes()
    key = int(values[100, 100])
    square = decode_square(png(256, 256, depth, 0, rows, png_chunk(b"tRNS", key.to_bytes(2, "big"))))
    grey = values >> 8 if depth == 16 else values * 255 // (2**depth - 1)
    np.testing.assert_array_equal(square[..., 1], np.where(values == key, 255, grey))


@pytest.mark.parametrize("depth", [8, 16])
def test_a_colour_can_be_transparent(depth: int) -> None:
    values = np.random.default_rng(21).integers(0, 2**depth, (256, 256, 3), np.uint16)
    values[50:90, 60:200] = key = values[0, 0]
    rows = values.astype(">u2" if depth == 16 else np.uint8).tobytes()
    square = decode_square(png(256, 256, depth, 2, rows, png_chunk(b"tRNS", key.astype(">u2").tobytes())))
    is_key = (values == key).all(axis=2, keepdims=True)
    np.testing.assert_array_equal(square, np.where(is_key, 255, values >> (depth - 8)))


# --- depth and colour ------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=8)
def test_sixteen_bit_grey_is_scaled_not_clipped(seed: int) -> None:
    deep = np.random.default_rng(seed).integers(0, 65536, (256, 256), np.uint16)
    little, big = deep.astype("<u2").tobytes(), deep.astype(">u2").tobytes()
    for data in (
        png(256, 256, 16, 0, big),
        grey_tiff(256, 256, 16, little),
        grey_tiff(256, 256, 16, big, order=">"),
        encoded(Image.fromarray(deep), "TIFF", compression="tiff_lzw"),
    ):
        square = decode_square(data)
        np.testing.assert_array_equal(square, np.repeat(deep[..., np.newaxis] >> 8, 3, axis=2))


def test_sixteen_bit_colour_and_alpha_are_scaled() -> None:
    deep = np.random.default_rng(22).integers(0, 65536, (256, 256, 4), np.uint16)
    rgb = decode_square(png(256, 256, 16, 2, deep[..., :3].astype(">u2").tobytes()))
    np.testing.assert_array_equal(rgb, deep[..., :3] >> 8)
    for colour_type, stored, shown in ((6, [0, 1, 2, 3], [0, 1, 2, 3]), (4, [0, 3], [0, 0, 0, 3])):
        data = png(256, 256, 16, colour_type, deep[..., stored].astype(">u2").tobytes())
        eight = (deep[..., shown] >> 8).astype(np.uint8)
        np.testing.assert_allclose(decode_square(data), on_white(eight), atol=1.5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tiff_greys_of_few_bits_are_spread_over_the_range(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (256, 256), np.uint8)
    unpacked = np.unpackbits(values[..., np.newaxis], axis=2)[..., 8 - bits :]
    packed = np.packbits(unpacked.reshape(256, -1), axis=1).tobytes()
    square = decode_square(grey_tiff(256, 256, bits, packed))
    np.testing.assert_array_equal(square[..., 0], values.astype(int) * 255 // (2**bits - 1))


@pytest.mark.parametrize(("kind", "bits", "sample_format"), [("f4", 32, 3), ("i4", 32, 2), ("i2", 16, 2)])
def test_pixels_without_an_agreed_range_are_refused_with_advice(
    kind: str, bits: int, sample_format: int
) -> None:
    pixels = (np.random.default_rng(23).random((64, 64)) * 1000).astype(f"<{kind}")
    with pytest.raises(UndecodableImage, match="save as 8 or 16 bits"):
        decode_square(grey_tiff(64, 64, bits, pixels.tobytes(), sample_format=sample_format))


def test_grey_and_bilevel_become_three_equal_channels() -> None:
    image = photograph(24, 256, 256)
    for mode in ("L", "1"):
        grey = image.convert(mode)
        expected = np.asarray(grey.convert("RGB"))
        np.testing.assert_array_equal(decode_square(encoded(grey, "PNG")), expected)
        if mode == "L":
            assert distance(decode_square(encoded(grey, quality=97)), expected) < 2
        else:
            np.testing.assert_array_equal(
                decode_square(encoded(grey, "TIFF", compression="group4")), expected
            )


def separated(seed: int) -> tuple[Image.Image, Floats]:
    """A CMYK picture and the RGB that a naive printer makes of it: white minus ink, minus black."""
    black = np.asarray(photograph(seed + 1, 256, 256).convert("L"))
    inks = np.dstack([np.asarray(photograph(seed, 256, 256)), black])
    image = Image.merge("CMYK", [Image.fromarray(np.ascontiguousarray(inks[..., i])) for i in range(4)])
    return image, (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255


def test_cmyk_keeps_its_colours() -> None:
    image, rgb = separated(25)
    assert np.abs(decode_square(encoded(image, "TIFF")) - rgb).max() < 2
    adobe = encoded(image, quality=97)
    assert b"Adobe" in adobe  # its inks are stored inverted, as Photoshop does
    assert np.abs(decode_square(adobe) - rgb).mean() < 2


def test_ycck_keeps_its_colours() -> None:
    image, rgb = separated(27)
    inks = np.asarray(image)
    luma_chroma = np.asarray(Image.fromarray(np.ascontiguousarray(inks[..., :3])).convert("YCbCr"))
    planes = [255 - luma_chroma[..., i] for i in range(3)] + [inks[..., 3]]
    stored = Image.merge("CMYK", [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes])
    data = bytearray(encoded(stored, quality=97))
    data[data.index(b"Adobe") + 11] = 2  # the transform byte: the first three planes are YCbCr
    assert np.abs(decode_square(bytes(data)) - rgb).mean() < 2


def test_lab_and_ycbcr_tiffs_keep_their_colours() -> None:
    image = photograph(29, 256, 256)
    for mode, options in (("LAB", {}), ("YCbCr", {"compression": "jpeg", "quality": 97})):
        square = decode_square(encoded(image.convert(mode), "TIFF", **options))
        assert distance(square, np.asarray(image)) < 3, mode


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_colour_profiles_are_ignored_damaged_or_not(image_format: str) -> None:
    image = photograph(30)
    for profile in (b"\0\0\2\0lcms" + bytes(500), np.random.default_rng(30).bytes(300_000)):
        got = decode_square(encoded(image, image_format, icc_profile=profile))
        np.testing.assert_array_equal(got, decode_square(encoded(image, image_format)))
