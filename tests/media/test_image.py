"""Pictures against transformers' PIL processor, and what must be refused or put right on the way."""

from __future__ import annotations

import base64
import io
import os
import pathlib
import struct
import subprocess
import sys
import textwrap
import threading
import warnings
import zlib
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from transformers.models.gemma4.image_processing_pil_gemma4 import (
    Gemma4ImageProcessorPil,
    get_aspect_ratio_preserving_size,
)

from gemcut.data import SOFT_TOKEN_BUDGETS, ImagePatches, pixel_values
from gemcut.errors import InvalidRequest
from gemcut.media import image as media
from gemcut.media.image import from_part, from_request_part, open_image, patches, target_size

rng = np.random.default_rng(41)


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return rng.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def encode(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def write_png(
    samples: np.ndarray, colour: int, depth: int, *extra: tuple[bytes, bytes], row_filter: int = 0
) -> bytes:
    """A PNG by hand: Pillow writes no 16-bit colour. samples [H, W, C]; row_filter 0 (none) or 1 (sub)."""
    height, width, channels = samples.shape
    rows = np.ascontiguousarray(samples, f">u{depth // 8}").view(np.uint8).reshape(height, -1)
    if row_filter == 1:
        step = channels * depth // 8
        rows = np.concatenate([rows[:, :step], rows[:, step:] - rows[:, :-step]], axis=1)
    lines = np.concatenate([np.full((height, 1), row_filter, np.uint8), rows], axis=1)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def pixels_of(source: media.Source, **options) -> np.ndarray:
    return np.asarray(open_image(source, **options).convert("RGB"))


def on_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:].astype(float) / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


# ------------------------------------------------------------------------------------------- size

SPEC_TABLE = [  # spec 4.1: height, width, budget, target height, target width, soft tokens
    (200, 300, 280, 624, 960, 260),
    (768, 1024, 280, 672, 912, 266),
    (1080, 1920, 280, 576, 1056, 264),
    (224, 224, 280, 768, 768, 256),
    (50, 40, 280, 864, 672, 252),
    (672, 960, 280, 672, 960, 280),
    (30, 2000, 280, 96, 6528, 272),
    (3000, 37, 280, 7200, 48, 150),
    (1000, 1000, 1120, 1584, 1584, 1089),
    (720, 1280, 1120, 1200, 2112, 1100),
    (720, 1280, 560, 816, 1488, 527),
    (720, 1280, 140, 384, 720, 120),
    (720, 1280, 70, 288, 528, 66),
    (10, 5000, 1120, 48, 35904, 748),
    (10, 5000, 70, 48, 3360, 70),
    (200, 300, 70, 288, 480, 60),
]


@pytest.mark.parametrize(("height", "width", "budget", "h", "w", "soft"), SPEC_TABLE)
def test_table_of_the_spec(height, width, budget, h, w, soft):
    assert target_size(height, width, budget) == (h, w)
    got = patches(Image.new("L", (width, height)), budget)
    assert (got.rows * 16, got.columns * 16, got.soft_tokens) == (h, w, soft)
    assert got.pixels.shape == (soft * 9, 768)


@settings(derandomize=True, max_examples=500, deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 10**6), st.sampled_from(SOFT_TOKEN_BUDGETS))
def test_size_is_the_references(height, width, budget):
    assert target_size(height, width, budget) == get_aspect_ratio_preserving_size(
        height, width, 16, budget * 9, 3
    )


def test_size_errs_where_the_reference_errs():
    side = 10**170  # the factor underflows: the one way to "both sides 0"
    with pytest.raises(ValueError, match="0 x 0"):
        get_aspect_ratio_preserving_size(side, side, 16, 2520, 3)
    with pytest.raises(InvalidRequest, match="cannot be brought to 280 soft tokens"):
        target_size(side, side, 280)
    for size in ((0, 5), (5, 0), (0, 0), (-1, 5)):
        with pytest.raises(InvalidRequest, match="1 pixel or more"):
            target_size(*size, 280)


@pytest.mark.parametrize("budget", [0, 1, 69, 256, 1121, -280])
def test_other_budgets_are_refused_by_name(budget):
    with pytest.raises(
        InvalidRequest, match=f"{budget}; a picture may have 70, 140, 280, 560, 1120"
    ) as error:
        patches(Image.new("L", (9, 9)), budget)
    assert error.value.param == "max_soft_tokens"


# ----------------------------------------------------------------------------------------- parity


@cache
def processor(budget: int) -> Gemma4ImageProcessorPil:
    return Gemma4ImageProcessorPil(max_soft_tokens=budget)


def assert_parity(picture: Image.Image, budget: int) -> None:
    want = processor(budget)(picture, return_tensors="np")
    got = patches(picture, budget)
    n = len(got.pixels)
    assert got.pixels.dtype == np.uint8
    assert want["num_soft_tokens_per_image"] == [got.soft_tokens]
    np.testing.assert_array_equal(pixel_values()[got.pixels], want["pixel_values"][0, :n])
    np.testing.assert_array_equal(got.positions(), want["image_position_ids"][0, :n])
    assert (want["image_position_ids"][0, n:] == -1).all()


def picture_of(mode: str, height: int, width: int) -> Image.Image:
    if mode == "P":
        picture = Image.fromarray(noise(height, width)).convert("P")
        picture.putpalette(noise(768).tobytes())
        if rng.random() < 0.5:
            picture.info["transparency"] = [7, noise(256).tobytes()][rng.integers(2)]
        return picture
    channels = {"1": 1, "L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    data = noise(height, width, channels)
    return (
        Image.frombytes("L", (width, height), data.tobytes()).convert("1")
        if mode == "1"
        else Image.frombytes(mode, (width, height), data.tobytes())
    )


def test_two_hundred_random_pictures_equal_the_reference():
    modes = ("L", "P", "RGB", "RGBA")
    for i in range(200):  # modes and budgets are coprime: each pair ten times
        height, width = np.exp(rng.uniform(0, np.log(900), 2)).astype(int).tolist()
        assert_parity(picture_of(modes[i % 4], height, width), SOFT_TOKEN_BUDGETS[i % 5])


@pytest.mark.parametrize("mode", ["1", "LA", "CMYK"])
def test_other_modes_equal_the_reference(mode):
    assert_parity(picture_of(mode, 61, 83), 70)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 2), (2, 1), (1, 700), (700, 1), (3, 48), (672, 960), (5000, 10)]
)
def test_edge_sizes_equal_the_reference(size):
    assert_parity(picture_of("RGB", *size), 280)
    assert_parity(picture_of("L", *size), 140)


def test_pixel_values_are_the_references():
    picture = Image.fromarray(np.resize(np.arange(256, dtype=np.uint8), (672, 960, 3)))  # size is kept
    want = processor(280)(picture, return_tensors="np")["pixel_values"][0]
    got = patches(picture, 280)
    assert pixel_values().dtype == np.float32
    np.testing.assert_array_equal(pixel_values()[got.pixels], want[: len(got.pixels)])
    np.testing.assert_array_equal(pixel_values(), (np.arange(256) / 255).astype(np.float32))


def test_patches_are_row_major_and_pixels_y_x_channel():
    array = noise(672, 960, 3)
    got = patches(array, 280)
    x, y = got.positions()[61]
    assert (x, y) == (1, 1)
    np.testing.assert_array_equal(got.pixels[61].reshape(16, 16, 3), array[16:32, 16:32])


# ---------------------------------------------------------------------------------- files and modes


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "1", {}),
        ("PNG", "L", {}),
        ("PNG", "LA", {}),
        ("PNG", "P", {}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("JPEG", "L", {}),
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "CMYK", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("GIF", "P", {}),
        ("GIF", "L", {}),
        ("GIF", "RGBA", {}),
    ],
)
def test_files(kind, mode, options, tmp_path):
    data = encode(picture_of(mode, 37, 53), kind, **options)
    stored = Image.open(io.BytesIO(data))
    got = open_image(data)
    assert got.mode in ("L", "RGB")
    assert got.size == (53, 37)
    if stored.has_transparency_data:
        want = on_white(np.asarray(stored.convert("RGBA")))
        assert np.abs(np.asarray(got) - want).max() <= 1
    else:
        np.testing.assert_array_equal(np.asarray(got.convert("RGB")), np.asarray(stored.convert("RGB")))
    assert_parity(stored, 70)

    path = tmp_path / "picture.with.any.name"
    path.write_bytes(data)
    for source in (path, str(path), bytearray(data), memoryview(data), stored, got):
        np.testing.assert_array_equal(np.asarray(open_image(source)), np.asarray(got))


def test_palette_with_transparency_is_put_on_white():
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    for transparency, want in (
        (0, [[255, 255, 255], [0, 0, 255]]),
        (b"\xff\x00", [[255, 0, 0], [255, 255, 255]]),
    ):
        data = encode(picture, "PNG", transparency=transparency)
        np.testing.assert_array_equal(pixels_of(data)[0], want)
    rgba_palette = Image.new("P", (1, 1))
    rgba_palette.putpalette([9, 9, 9, 0], "RGBA")
    np.testing.assert_array_equal(pixels_of(rgba_palette)[0], [[255, 255, 255]])


def test_transparent_colour_of_grey_and_colour_pngs():
    grey = np.array([[[10], [20]]])
    data = write_png(grey, 0, 8, (b"tRNS", struct.pack(">H", 10)))
    np.testing.assert_array_equal(pixels_of(data)[0, :, 0], [255, 20])
    colour = np.array([[[1, 2, 3], [1, 2, 4]]])
    data = write_png(colour, 2, 8, (b"tRNS", struct.pack(">HHH", 1, 2, 3)))
    np.testing.assert_array_equal(pixels_of(data)[0], [[255, 255, 255], [1, 2, 4]])


def test_tall_pictures_with_alpha_are_composited_whole():
    rgba = noise(3000, 700, 4)  # more than one band of rows
    assert np.abs(pixels_of(rgba) - on_white(rgba)).max() <= 1


def test_premultiplied_modes():
    rgba = np.array([[[200, 100, 50, 128], [9, 9, 9, 0]]], np.uint8)
    want = on_white(rgba)
    premultiplied = Image.fromarray(rgba).convert("RGBa")
    assert np.abs(pixels_of(premultiplied) - want).max() <= 2
    la = Image.fromarray(rgba[..., 2:]).convert("La")
    assert np.abs(pixels_of(la)[..., 0] - on_white(rgba[..., [2, 2, 2, 3]])[..., 0]).max() <= 2


# ---------------------------------------------------------------------------------------- 16 bits

ALL_16 = np.arange(65536).reshape(256, 256, 1)
ALL_8 = np.rint(ALL_16 / 257).astype(np.uint8)


def test_16_bit_grey_is_divided_by_257_and_rounded():
    png = write_png(ALL_16, 0, 16)
    little = Image.fromarray(ALL_16[..., 0].astype("<u2"))
    assert little.mode == "I;16"
    for source in (png, little, ALL_16.astype(np.uint16), ALL_16[..., 0].astype(">u2")):
        picture = open_image(source)
        assert picture.mode == "L"
        np.testing.assert_array_equal(np.asarray(picture), ALL_8[..., 0])


@pytest.mark.parametrize("row_filter", [0, 1])
@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_and_alpha_too(colour, channels, row_filter):
    samples = np.concatenate([ALL_16, ALL_16[::-1], ALL_16[:, ::-1], 65535 - ALL_16 // 3], axis=-1)
    samples = samples[..., [0, 3] if channels == 2 else range(channels)]
    eight = np.rint(samples / 257).astype(np.uint8)
    got = pixels_of(write_png(samples, colour, 16, row_filter=row_filter))
    if channels == 3:
        np.testing.assert_array_equal(got, eight)
    else:
        want = on_white(eight[..., [0, 0, 0, 1]] if channels == 2 else eight)
        assert np.abs(got - want).max() <= 1


def test_16_bit_transparent_colour():
    grey = np.array([[[300], [301]]])
    np.testing.assert_array_equal(
        pixels_of(write_png(grey, 0, 16, (b"tRNS", struct.pack(">H", 300))))[0, :, 0], [255, 1]
    )
    colour = np.array([[[300, 600, 900], [300, 600, 901]]])
    data = write_png(colour, 2, 16, (b"tRNS", struct.pack(">HHH", 300, 600, 900)))
    np.testing.assert_array_equal(pixels_of(data)[0], [[255, 255, 255], [1, 2, 4]])


# ----------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(picture_of("RGB", 24, 40), kind, exif=exif)
    stored = Image.open(io.BytesIO(data))
    want = np.asarray(ImageOps.exif_transpose(stored))
    got = open_image(data)
    assert got.size == ((24, 40) if orientation > 4 else (40, 24))
    np.testing.assert_array_equal(np.asarray(got), want)
    np.testing.assert_array_equal(np.asarray(open_image(got)), want)  # not turned twice
    np.testing.assert_array_equal(pixels_of(stored), want)
    assert stored.getexif()[ExifTags.Base.Orientation] == orientation  # the caller's picture is as it was
    np.testing.assert_array_equal(patches(data, 70).pixels, patches(want, 70).pixels)


def test_orientation_by_hand():
    # Orientation 6: the stored top left corner belongs at the top right.
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encode(Image.fromarray(np.array([[0, 50, 100], [150, 200, 250]], np.uint8)), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(data)), [[150, 0], [200, 50], [250, 100]])


def test_orientation_of_16_bit_and_alpha():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    chunk = (b"eXIf", exif.tobytes()[6:])
    data = write_png(np.array([[[257, 514, 771], [0, 0, 0]]]), 2, 16, chunk)
    np.testing.assert_array_equal(pixels_of(data)[0], [[0, 0, 0], [1, 2, 3]])
    data = write_png(np.array([[[9, 9, 9, 0], [0, 0, 0, 255]]]), 6, 8, chunk)
    np.testing.assert_array_equal(pixels_of(data)[0], [[0, 0, 0], [255, 255, 255]])


@pytest.mark.parametrize("body", [b"junk", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x02\x01\x12", b""])
def test_unreadable_metadata_counts_as_absent(body):
    picture = picture_of("RGB", 8, 8)
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encode(picture, kind, exif=b"Exif\0\0" + body)
        plain = encode(picture, kind)
        np.testing.assert_array_equal(pixels_of(data), pixels_of(plain))


# ----------------------------------------------------------------------------------- first frames


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (16, 12), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    stored = Image.open(io.BytesIO(data))
    stored.seek(2)  # there are three
    assert np.abs(pixels_of(data).astype(int) - [255, 0, 0]).max() <= 1


def test_first_picture_of_an_mpo():
    pictures = [Image.new("RGB", (16, 12), colour) for colour in ("red", "blue")]
    data = encode(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.abs(pixels_of(data).astype(int) - [255, 0, 0]).max() <= 2


# ----------------------------------------------------------------------------------------- arrays


def test_arrays():
    grey, rgb, rgba = noise(5, 7), noise(5, 7, 3), noise(5, 7, 4)
    np.testing.assert_array_equal(np.asarray(open_image(grey)), grey)
    np.testing.assert_array_equal(np.asarray(open_image(grey[..., None])), grey)
    np.testing.assert_array_equal(np.asarray(open_image(rgb)), rgb)
    np.testing.assert_array_equal(np.asarray(open_image(rgb[::-1, ::2])), rgb[::-1, ::2])
    assert np.abs(np.asarray(open_image(rgba)) - on_white(rgba)).max() <= 1
    for dtype in (np.float16, np.float32, np.float64):
        np.testing.assert_array_equal(np.asarray(open_image((rgb / 255).astype(dtype))), rgb)
    np.testing.assert_array_equal(np.asarray(open_image(rgb.astype(np.uint16) * 257)), rgb)


def test_arrays_are_not_shared():
    array = noise(5, 7)
    picture, before = open_image(array), array.copy()
    array[:] = 0
    np.testing.assert_array_equal(np.asarray(picture), before)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\].*channels last"),
        (np.zeros((8, 8, 2), np.uint8), r"shape \[8, 8, 2\]"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"shape \[1, 8, 8, 3\]"),
        (np.zeros(8, np.uint8), r"shape \[8\]"),
        (np.zeros((0, 8), np.uint8), "8 x 0 pixels"),
        (np.zeros((8, 0, 3), np.float32), "0 x 8 pixels"),
        (np.zeros((8, 8), bool), "is bool"),
        (np.zeros((8, 8), np.int64), "is int64"),
        (np.zeros((8, 8), complex), "is complex128"),
        (np.full((8, 8), 1.5), "floats from 1.5 to 1.5"),
        (np.full((8, 8), -0.1), "from -0.1"),
        (np.full((8, 8), np.nan), "from nan"),
        (np.full((8, 8), np.inf), "to inf"),
    ],
)
def test_arrays_refused(array, message):
    with pytest.raises(InvalidRequest, match=message):
        open_image(array)


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"hello", "5 bytes that begin with 68 65 6c 6c 6f are no picture.*PNG, JPEG, WebP and GIF"),
        (b"\x89PNG", "4 bytes"),
        (encode(Image.new("RGB", (4, 4)), "BMP"), "This is BMP data"),
        (encode(Image.new("RGB", (4, 4)), "TIFF"), "This is TIFF data"),
        (encode(Image.new("RGB", (4, 4)), "AVIF"), "This is AVIF data"),
        (encode(Image.new("RGB", (16, 16)), "ICO"), "This is ICO data"),
        (encode(Image.new("RGB", (4, 4)), "JPEG2000"), "This is JPEG 2000 data"),
        (encode(Image.new("RGB", (4, 4)), "PDF"), "This is PDF data"),
        (encode(Image.new("RGB", (4, 4)), "PPM"), "begin with 50 36"),
        (b"\n <svg xmlns='x'>", "This is SVG data"),
        (b"<!DOCTYPE html><html>404", "This is HTML data"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "16 bytes"),
    ],
)
def test_other_formats_are_named(data, message):
    with pytest.raises(InvalidRequest, match=message):
        open_image(data)


def test_paths_that_are_no_pictures(tmp_path):
    with pytest.raises(InvalidRequest, match=r"There is no picture file .*nowhere\.png"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(InvalidRequest, match="is a directory"):
        open_image(tmp_path)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        open_image("a\0b.png")
    with pytest.raises(InvalidRequest, match="cannot be read: File name too long"):
        open_image("x" * 5000)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidRequest, match="not a regular file"):
        open_image(tmp_path / "pipe")
    with pytest.raises(InvalidRequest, match="not a regular file"):
        open_image("/dev/zero")
    (tmp_path / "empty.png").touch()
    with pytest.raises(InvalidRequest, match="empty"):
        open_image(tmp_path / "empty.png")


def test_byte_and_pixel_limits(tmp_path):
    data = encode(picture_of("RGB", 30, 40), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    assert open_image(path, max_bytes=len(data), max_pixels=1200).size == (40, 30)
    for source in (data, path):
        with pytest.raises(InvalidRequest, match=f"{len(data):,} bytes; at most {len(data) - 1:,}"):
            open_image(source, max_bytes=len(data) - 1)
    for source in (data, path, Image.open(io.BytesIO(data)), noise(30, 40)):
        with pytest.raises(InvalidRequest, match="40 x 30 = 1,200 pixels; at most 1,199"):
            open_image(source, max_pixels=1199)
        with pytest.raises(InvalidRequest, match="at most 1,199"):
            patches(source, 70, max_pixels=1199)


def test_pillow_images_refused():
    for mode in ("I", "F", "LAB"):
        with pytest.raises(InvalidRequest, match=f"mode is {mode}.*convert it"):
            open_image(Image.new(mode, (4, 4)))
    with pytest.raises(InvalidRequest, match="0 x 4 pixels"):
        open_image(Image.new("RGB", (0, 4)))
    cut = encode(picture_of("RGB", 40, 40), "PNG")[:2000]
    with pytest.raises(InvalidRequest, match="Pillow image cannot be decoded"):
        open_image(Image.open(io.BytesIO(cut)))


@pytest.mark.parametrize("source", [None, 3, ["a.png"], {"image": 1}])
def test_other_types_are_refused(source):
    with pytest.raises(InvalidRequest, match=f"cannot be made from {type(source).__name__}"):
        open_image(source)


def huge_headers() -> dict[str, bytes]:
    """Small files that claim 50,000 x 50,000 pixels, or as much as the format can say."""
    png = write_png(np.zeros((1, 1, 3)), 2, 8)
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    png = png[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + png[33:]
    jpeg = bytearray(encode(Image.new("RGB", (8, 8)), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 50_000, 50_000)
    gif = bytearray(encode(Image.new("L", (8, 8)), "GIF"))
    gif[6:10] = struct.pack("<HH", 50_000, 50_000)
    frame = bytearray(encode(Image.new("L", (8, 8)), "GIF"))  # a frame far beyond its canvas
    at = frame.index(b"\x2c\0\0\0\0\x08\0\x08\0")
    frame[at + 5 : at + 9] = struct.pack("<HH", 50_000, 50_000)
    lossy = bytearray(encode(Image.new("RGB", (8, 8)), "WEBP"))
    lossy[26:30] = struct.pack("<HH", 16_383, 16_383)
    lossless = bytearray(encode(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
    (bits,) = struct.unpack_from("<I", lossless, 21)
    struct.pack_into("<I", lossless, 21, bits | 0xFFFFFFF)
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    extended = bytearray(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    assert extended[12:16] == b"VP8X"
    extended[24:30] = (49_999).to_bytes(3, "little") * 2
    return {
        "png": png,
        "jpeg": bytes(jpeg),
        "gif": bytes(gif),
        "gif-frame": bytes(frame),
        "webp-lossy": bytes(lossy),
        "webp-lossless": bytes(lossless),
        "webp-extended": bytes(extended),
    }


@pytest.mark.parametrize("name", huge_headers())
def test_bombs_are_refused_by_their_header(name):
    with pytest.raises(InvalidRequest, match="pixels"):
        open_image(huge_headers()[name])


def test_bombs_allocate_nothing(tmp_path):
    for name, data in huge_headers().items():
        (tmp_path / name).write_bytes(data)
    code = """
        import pathlib, resource, sys
        from gemcut.errors import InvalidRequest
        from gemcut.media.image import open_image
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)  # address space, touched or not
        for path in pathlib.Path(sys.argv[1]).iterdir():
            try:
                open_image(path)
            except InvalidRequest as error:
                assert "pixels" in str(error), error
            else:
                raise SystemExit(f"{path} was opened")
    """
    root = pathlib.Path(media.__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def test_narrow_lines_that_would_fill_memory():
    with pytest.raises(InvalidRequest, match=r"1 x 3,000,000 pixels is too narrow.*144,000,000 pixels"):
        patches(Image.new("L", (1, 3_000_000)), 280)
    assert patches(Image.new("L", (3_000_000, 1)), 280).rows == 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_pillows_own_limit_neither_warns_nor_refuses(kind, monkeypatch):
    data = encode(picture_of("L", 20, 20), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert open_image(data).size == (20, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # more than twice the limit is an error to Pillow
    if kind == "WEBP":
        with pytest.raises(InvalidRequest, match="MAX_IMAGE_PIXELS"):
            open_image(data)
    else:
        assert open_image(data).size == (20, 20)


EXIF_6 = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"  # orientation 6
SMALL_FILES = {
    "png": encode(picture_of("RGB", 19, 23), "PNG"),
    "png-palette": encode(picture_of("P", 19, 23), "PNG"),
    "png-16": write_png(noise(9, 11, 3, dtype=np.uint16), 2, 16),
    "png-la-16": write_png(noise(9, 11, 2, dtype=np.uint16), 4, 16),
    "png-exif": encode(picture_of("L", 9, 11), "PNG", exif=EXIF_6),
    "jpeg": encode(picture_of("RGB", 19, 23), "JPEG"),
    "jpeg-progressive": encode(picture_of("RGB", 19, 23), "JPEG", progressive=True),
    "jpeg-cmyk": encode(picture_of("CMYK", 19, 23), "JPEG"),
    "webp": encode(picture_of("RGB", 19, 23), "WEBP"),
    "webp-lossless": encode(picture_of("RGBA", 19, 23), "WEBP", lossless=True),
    "gif": encode(picture_of("P", 19, 23), "GIF"),
}


@pytest.mark.parametrize("name", SMALL_FILES)
def test_every_truncation_is_refused(name):
    data = SMALL_FILES[name]
    whole = pixels_of(data)
    for length in range(len(data)):
        try:
            got = pixels_of(data[:length])
        except InvalidRequest as error:
            text = str(error)
            assert f"{length:,} bytes" in text
        else:  # a GIF's last two bytes, after all of its pixels, say only that the file ends
            assert name == "gif"
            assert length >= len(data) - 2
            np.testing.assert_array_equal(got, whole)


@settings(derandomize=True, max_examples=1500, deadline=None)
@given(
    st.sampled_from(sorted(SMALL_FILES)),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=6), st.integers(0, 6)), max_size=4),
    st.booleans(),
)
def test_damaged_files_are_pictures_or_refused(name, edits, early):
    """Never another exception, never a warning. Half of the edits go to the first 64 bytes, the headers."""
    data = bytearray(SMALL_FILES[name])
    for where, new, cut in edits:
        at = int(where * (min(64, len(data)) if early else len(data)))
        data[at : at + cut] = new
    try:
        picture = open_image(bytes(data), max_pixels=1_000_000)
    except InvalidRequest:
        return
    assert picture.mode in ("L", "RGB")
    assert isinstance(patches(picture, 70), ImagePatches)


def test_warning_filters_survive_threads():
    before = list(warnings.filters)
    data = SMALL_FILES["png-exif"]
    threads = [threading.Thread(target=lambda: [open_image(data) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


# ---------------------------------------------------------------------------------------- digests


def test_twins_have_different_digests():
    digests = set()
    for _ in range(60):
        data = noise(3000)
        digests |= {patches(data.reshape(shape), 70).digest for shape in ((30, 100), (100, 30))}
    assert len(digests) == 120
    assert {len(digest) for digest in digests} == {32}


def test_palette_twins_have_different_digests():
    picture = picture_of("P", 20, 20)
    digests = set()
    for _ in range(60):
        picture.putpalette(noise(768).tobytes())
        digests.add(patches(encode(picture, "PNG"), 70).digest)
    assert len(digests) == 60


def test_digest_depends_on_the_setting_and_on_nothing_else():
    picture = picture_of("RGB", 30, 40)
    digests = [patches(picture, budget).digest for budget in SOFT_TOKEN_BUDGETS]
    assert len(set(digests)) == 5
    for source in (encode(picture, "PNG"), np.asarray(picture), encode(picture, "PNG", compress_level=0)):
        assert patches(source, 70).digest == digests[0]
    # One pixel of one channel, by one: seen if it is seen after resizing.
    array = noise(672, 960, 3)
    before = patches(array, 280).digest
    array[300, 300, 1] ^= 1
    assert patches(array, 280).digest != before
    # Flat pictures of other sizes that resize to the same patches.
    flat = {patches(np.full((n, n), 9, np.uint8), 70).digest for n in range(20, 30)}
    assert len(flat) == 10


# ------------------------------------------------------------------------------------------ parts

PNG = encode(picture_of("RGB", 8, 6), "PNG")
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URI}},
        {"type": "image_url", "image_url": {"url": URI, "detail": "auto"}},
        {"type": "image_url", "image_url": URI},
        {"type": "image", "url": URI},
        {"type": "image", "image": URI, "text": None},
        {"type": "image", "image": URI.replace("data:image/png", "DATA:IMAGE/jpeg;name=x")},
        {"type": "image", "base64": URI.partition(",")[2]},
        {"type": "image", "base64": URI},
    ],
)
def test_parts_that_may_come_over_a_network(part):
    for read in (from_part, from_request_part):
        np.testing.assert_array_equal(np.asarray(read(part)), pixels_of(PNG))


def test_parts_of_the_python_interface(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    for part in (
        {"type": "image", "image": str(path)},
        {"type": "image", "image": path},
        {"type": "image", "path": str(path)},
        {"type": "image", "path": path},
        {"type": "image", "image": PNG},
        {"type": "image", "image": Image.open(path)},
        {"type": "image", "image": pixels_of(PNG)},
    ):
        np.testing.assert_array_equal(np.asarray(from_part(part)), pixels_of(PNG))
        with pytest.raises(InvalidRequest):
            from_request_part(part)


@pytest.mark.parametrize(
    ("part", "message", "param"),
    [
        ({"type": "text", "text": "x"}, "type 'text' is no picture", "type"),
        ({}, "type None is no picture", "type"),
        ({"type": "image"}, "needs one of image, url, path, base64; it has none", "image"),
        ({"type": "image", "url": URI, "image": URI}, "it has url, image", "image"),
        ({"type": "image", "url": URI, "resize": 3}, "no field 'resize'", "resize"),
        ({"type": "image_url"}, "needs one of image_url", "image_url"),
        ({"type": "image_url", "url": URI}, "no field 'url'", "url"),
        ({"type": "image_url", "image_url": {}}, "must be text; it is NoneType", "image_url.url"),
        ({"type": "image_url", "image_url": {"url": 3}}, "must be text; it is int", "image_url.url"),
        ({"type": "image_url", "image_url": {"url": URI, "size": 1}}, "no field 'size'", "image_url.size"),
        (
            {"type": "image_url", "image_url": {"url": URI, "detail": "high"}},
            "max_soft_tokens",
            "image_url.detail",
        ),
        (
            {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}},
            "Fetching is off",
            "image_url.url",
        ),
        (
            {"type": "image_url", "image_url": {"url": "HTTP://127.0.0.1/"}},
            "Fetching is off",
            "image_url.url",
        ),
        (
            {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
            "must be a data URI",
            "image_url.url",
        ),
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "must be a data URI", "image_url.url"),
        (
            {"type": "image_url", "image_url": {"url": " data:image/png;base64,"}},
            "must be a data",
            "image_url.url",
        ),
        ({"type": "image_url", "image_url": {"url": ""}}, "must be a data URI", "image_url.url"),
        ({"type": "image", "image": "https://x.org/a.png"}, "Fetching is off", "image"),
        ({"type": "image", "image": "file:///etc/passwd"}, "must be a data URI", "image"),
        ({"type": "image", "url": "a.png"}, "must be a data URI", "url"),
        ({"type": "image", "url": b"a.png"}, "must be text; it is bytes", "url"),
        ({"type": "image", "path": 7}, "must be text; it is int", "path"),
        ({"type": "image", "image": 7}, "cannot be made from int", "image"),
        ({"type": "image", "image": "data:image/png;base64"}, "no comma", "image"),
        ({"type": "image", "url": "data:text/html;base64,AAAA"}, "media type is 'text/html'", "url"),
        ({"type": "image", "url": "data:image/png,AAAA"}, "not base64", "url"),
        ({"type": "image", "url": "data:image/svg+xml;base64,PHN2Zz4="}, "SVG data", "url"),
        ({"type": "image", "url": "data:image/png;base64,"}, r"empty \(0 bytes\)", "url"),
        ({"type": "image", "base64": "AAA"}, "base64 text .3 characters. is not valid", "base64"),
        ({"type": "image", "base64": "AA\nAA"}, "not valid", "base64"),
        ({"type": "image", "base64": "AA_-"}, "not valid", "base64"),
        ({"type": "image", "base64": "AAAA=AAA"}, "not valid", "base64"),
        ({"type": "image", "base64": "ÄÄÄÄ"}, "not valid", "base64"),
    ],
)
def test_parts_refused(part, message, param):
    with pytest.raises(InvalidRequest, match=message) as error:
        from_part(part)
    assert error.value.param == param
    with pytest.raises(InvalidRequest):
        from_request_part(part)


def test_a_request_names_no_local_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    spellings = [str(path), f"file://{path}", f"FILE://{path}", f"file:{path}", os.path.relpath(path)]
    for text in spellings:
        for part in (
            {"type": "image", "image": text},
            {"type": "image", "path": text},
            {"type": "image", "url": text},
            {"type": "image", "base64": text},
            {"type": "image_url", "image_url": text},
        ):
            with pytest.raises(InvalidRequest):
                from_request_part(part)


def test_base64_is_measured_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(media, "MAX_BYTES", 1000)
    monkeypatch.setattr(media.base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(InvalidRequest, match="about 1,200 bytes; at most 1,000"):
        from_part({"type": "image", "base64": "A" * 1600})
