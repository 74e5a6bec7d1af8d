"""Pictures: bytes, paths, Pillow images and arrays in; `ImagePatches` out (spec 4.1, steps 1 to 5).

Pixels stay uint8: the model scales them with `data.pixel_values()`. This module knows nothing of tokens,
prompts or networks, and it fetches nothing (`fetch` does): a URL is either a data URI or refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import os
import stat
import struct
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import ExifTags, GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from gemcut.data import PATCH, POOL, SOFT_TOKEN_BUDGETS, ImagePatches
from gemcut.errors import InvalidRequest

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray

MAX_PIXELS = 100_000_000  # decoded; Pillow holds 4 bytes for each pixel of a colour picture
MAX_BYTES = 64 << 20  # encoded

_SIDE = PATCH * POOL  # pixels a side that one soft token covers: 48

# The plugin classes are called directly, not through Image.open: no format but these four is ever tried, a
# JPEG with several pictures (MPO) is its first one, and Pillow's own pixel limit, a process-wide global
# that warns, stays out of the way of ours.
_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
}

# How the formats that are refused begin, so that the refusal can name them.
_OTHER_FORMATS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"8BPS", "PSD"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftyp", "MP4"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"PK\3\4", "ZIP"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML or SVG"),
    (0, b"<html", "HTML"),
    (0, b"<!doctype html", "HTML"),
)

_UPRIGHT = {  # EXIF orientation -> what turns the stored picture the right way up
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_SIDEWAYS = (  # rows become columns
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
_FROM_THE_END = (  # the last row or column becomes the first row
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_MODES_16 = ("I;16", "I;16L", "I;16B", "I;16N")


# ---------------------------------------------------------------------------------- size (step 2)


def target_size(height: int, width: int, budget: int) -> tuple[int, int]:
    """The (height, width) in pixels to which spec 4.1 step 2 resizes a picture; multiples of 48.

    The largest size of about the same shape that costs at most `budget` soft tokens. Small pictures are
    enlarged. Raises InvalidRequest for a budget outside SOFT_TOKEN_BUDGETS, for a side below 1 pixel, and
    where the spec errs (no size fits; for sides that a file can have this does not happen).
    """
    if budget not in SOFT_TOKEN_BUDGETS:
        raise InvalidRequest(
            f"max_soft_tokens is {budget}; a picture may have {', '.join(map(str, SOFT_TOKEN_BUDGETS))}.",
            param="max_soft_tokens",
        )
    if height < 1 or width < 1:
        raise InvalidRequest(f"The picture is {width} x {height} pixels; each side needs 1 pixel or more.")

    max_area = budget * _SIDE * _SIDE
    # Double precision and this order of operations, as the reference: the floors depend on it.
    factor = math.sqrt(max_area / (height * width))
    h = math.floor(factor * height / _SIDE) * _SIDE
    w = math.floor(factor * width / _SIDE) * _SIDE
    if h == 0 and w == 0:
        raise InvalidRequest(
            f"A picture of {width} x {height} pixels cannot be brought to {budget} soft tokens."
        )
    if h == 0:
        h, w = _SIDE, min(math.floor(width / height) * _SIDE, budget * _SIDE)
    elif w == 0:
        h, w = min(math.floor(height / width) * _SIDE, budget * _SIDE), _SIDE
    if h * w > max_area:
        raise InvalidRequest(
            f"A picture of {width} x {height} pixels becomes {w} x {h}, more than {budget} soft tokens."
        )
    return h, w


# ------------------------------------------------------------------------------- opening (step 1)


def open_image(source: Source, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Decode, turn upright by EXIF, put on white: a Pillow image of mode L or RGB (spec 4.1 step 1).

    source:
        a path, or the bytes of a file: JPEG, PNG, WebP or GIF, told apart by content; the first frame.
        a Pillow image: any 8-bit mode, 1-bit, or 16-bit grey (I;16). It is not changed.
        an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]: uint8, uint16 (65535 is white), or floats in
            0..1 (rounded to the nearest 1/255).
    max_pixels: a limit on height * width, checked in the file's header before anything is decoded.
    max_bytes: a limit on the encoded file.

    16-bit samples, of arrays, PNG files (grey or colour) and Pillow images, are divided by 257 and rounded.
    Grey stays L, a third of the work: resizing L and then repeating it gives the bytes that RGB gives.
    Metadata that cannot be read counts as absent; the picture is then taken as stored.

    Raises InvalidRequest, and nothing else, for whatever the caller can get wrong: no such file, another
    format, too many pixels or bytes, a truncated or damaged file, an array of another kind.
    """
    picture = _decoded(source, max_pixels, max_bytes)
    flat = _upright(_flatten(picture), _turn(picture))
    if flat is not picture:
        flat.info = {}
    return flat


def file_bytes(source: Source, *, max_bytes: int = MAX_BYTES) -> bytes | bytearray | memoryview | None:
    """The encoded file that a source is or names, None for a picture that is decoded already.

    Raises InvalidRequest as `open_image` does for a file that is not there, or is too long.
    """
    if isinstance(source, str | os.PathLike):
        source = _read(source, max_bytes)
    if not isinstance(source, bytes | bytearray | memoryview):
        return None
    size = memoryview(source).nbytes
    if size > max_bytes:
        raise InvalidRequest(f"The picture has {size:,} bytes; at most {max_bytes:,} are accepted.")
    return source


def _decoded(source: Source, max_pixels: int, max_bytes: int = MAX_BYTES) -> Image.Image:
    """A picture as it is stored: not yet turned upright, of a mode that `_flatten` takes."""
    if isinstance(source, Image.Image):
        _check_pixels(*source.size, max_pixels)
        with _decoding("The Pillow image"):
            picture = _load(source)
    elif isinstance(source, np.ndarray):
        picture = _from_array(source, max_pixels)
    elif (data := file_bytes(source, max_bytes=max_bytes)) is not None:
        data = bytes(data)
        kind = _sniff(data)
        with _decoding(f"The {kind} picture of {len(data):,} bytes", "Send the whole file again."):
            picture = _decode(data, kind, max_pixels)
    else:
        raise InvalidRequest(
            f"A picture cannot be made from {type(source).__name__}: "
            "give a path, the bytes of a file, a Pillow image or a numpy array."
        )
    if picture.mode not in _MODES + _MODES_16:
        raise InvalidRequest(
            f"The picture's mode is {picture.mode}, whose range is not known; "
            "convert it to L, RGB or RGBA first."
        )
    return picture


def _read(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise InvalidRequest(f"{os.fspath(path)!r} is a directory; name a picture file.")
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device may never end
            raise InvalidRequest(f"{os.fspath(path)!r} is not a regular file; name a picture file.")
        if status.st_size > max_bytes:
            raise InvalidRequest(
                f"{os.fspath(path)!r} has {status.st_size:,} bytes; at most {max_bytes:,} are accepted."
            )
        with open(path, "rb") as file:
            return file.read(status.st_size + 1)  # read() sets aside all that it is asked for
    except FileNotFoundError:
        raise InvalidRequest(f"There is no picture file {os.fspath(path)!r}.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidRequest(f"The picture file {os.fspath(path)!r} cannot be read: {reason}.") from error


def _sniff(data: bytes) -> str:
    """The format by content. Names what was found when it is none that we read."""
    if not data:
        raise InvalidRequest("The picture is empty (0 bytes).")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    start = data[:32].lstrip().lower() if data.lstrip()[:1] == b"<" else data[:32]
    for offset, magic, name in _OTHER_FORMATS:
        if start[offset:].startswith(magic):
            found = f"This is {name} data"
            break
    else:
        found = f"{len(data):,} bytes that begin with {data[:8].hex(' ')} are no picture"
    raise InvalidRequest(f"{found}; the formats read are PNG, JPEG, WebP and GIF.")


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise InvalidRequest(f"The picture is {width} x {height} pixels; each side needs 1 pixel or more.")
    if width * height > max_pixels:
        raise InvalidRequest(
            f"The picture has {width:,} x {height:,} = {width * height:,} pixels; "
            f"at most {max_pixels:,} are accepted. Send a smaller one."
        )


@contextmanager
def _decoding(what: str, remedy: str = "") -> Iterator[None]:
    # Any exception: on hostile bytes Pillow raises what its parsers happen to raise (OSError, SyntaxError,
    # struct.error, zlib.error, KeyError, ...). Its texts are kept out of ours, for they may hold addresses;
    # the cause is chained.
    try:
        yield
    except (InvalidRequest, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # WebP, and a GIF frame beyond its canvas
        raise InvalidRequest(
            f"{what} has more pixels than twice PIL.Image.MAX_IMAGE_PIXELS. Send a smaller one."
        ) from error
    except Exception as error:
        raise InvalidRequest(
            f"{what} cannot be decoded: it is truncated or damaged. {remedy}".rstrip()
        ) from error


_warnings_lock = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    # Pillow warns of odd metadata. The filters belong to the whole process and catch_warnings is not
    # safe between threads: the lock keeps our own threads apart, and only headers are read inside.
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode(data: bytes, kind: str, max_pixels: int) -> Image.Image:
    if kind == "WEBP":  # the decoder allocates two canvases when it opens, so look first
        _check_pixels(*_webp_size(data), max_pixels)
    if kind == "PNG" and data.rfind(b"IEND\xaeB`\x82") < 0:  # Pillow is content without the end
        raise EOFError("no IEND chunk")
    with _quiet():
        picture = _PLUGINS[kind](io.BytesIO(data))
    _check_pixels(*picture.size, max_pixels)
    if kind == "PNG" and picture.tile and picture.tile[0].args in ("RGB;16B", "RGBA;16B", "LA;16B"):
        return _decode_png_16(data, picture)
    return _load(picture)


def _load(picture: Image.Image) -> Image.Image:
    picture.load()
    return picture


def _webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the canvas, from the first chunk (RFC 9649)."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("no VP8 chunk")


# ----------------------------------------------------------------------- depth, alpha, orientation


def _eight_bits(samples: np.ndarray) -> np.ndarray:
    """uint16 -> uint8: v / 257 rounded (257 is odd, so there are no ties)."""
    table = ((np.arange(65536, dtype=np.uint32) + 128) // 257).astype(np.uint8)
    return table[samples]


def _decode_png_16(data: bytes, picture: ImageFile.ImageFile) -> Image.Image:
    # Pillow has no 16-bit colour mode and keeps the high bytes only, which is not v / 257. So the low bytes
    # are read too: as "little-endian" samples, whose high bytes they would be; for grey with alpha, which
    # has 4 bytes a pixel, as RGBA.
    tile = picture.tile[0]
    if tile.args == "LA;16B":
        picture.tile = [tile._replace(args="RGBA")]
        samples = np.asarray(_load(picture)).view(">u2")  # [H, W, 2]
    else:
        with _quiet():
            low = PngImagePlugin.PngImageFile(io.BytesIO(data))
        low.tile = [low.tile[0]._replace(args=str(tile.args).replace("16B", "16L"))]
        samples = np.asarray(_load(picture)).astype(np.uint16)  # [H, W, 3 or 4]
        samples <<= 8
        samples |= np.asarray(_load(low))
    pixels = _eight_bits(samples)
    key = picture.info.pop("transparency", None)  # RGB: the one colour, in 16 bits, that is transparent
    if key is not None:
        alpha = np.where((samples == np.array(key, np.uint16)).all(axis=-1, keepdims=True), 0, 255)
        pixels = np.concatenate([pixels, alpha.astype(np.uint8)], axis=-1)
    deep = Image.fromarray(pixels)  # mode LA, RGB or RGBA by the number of channels
    deep.info = picture.info
    return deep


def _from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InvalidRequest(
            f"The picture array has shape {list(array.shape)}; "
            "it must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], channels last."
        )
    _check_pixels(array.shape[1], array.shape[0], max_pixels)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        array = _eight_bits(array)
    elif array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # so NaN is refused too
            raise InvalidRequest(
                f"The picture array holds floats from {low:g} to {high:g}; they must lie in 0..1. "
                "Divide by the largest value, or give uint8."
            )
        array = np.rint(array.astype(np.float32, copy=False) * np.float32(255)).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InvalidRequest(
            f"The picture array is {array.dtype}; "
            "it must be uint8, uint16 (65535 is white) or floats in 0..1."
        )
    picture = Image.fromarray(np.ascontiguousarray(array))
    # A grey image would share the caller's memory and change with it.
    return picture.copy() if picture.mode == "L" else picture


def _flatten(picture: Image.Image) -> Image.Image:
    """A loaded picture, opaque, L or RGB. It is the picture itself if there is nothing to do."""
    if picture.mode in _MODES_16:
        return _flatten_16(picture)
    if picture.has_transparency_data:
        return _on_white(picture)
    mode = "L" if picture.mode in ("1", "L") else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)


def _upright(picture: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return picture if turn is None else picture.transpose(turn)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """What turns the picture the right way up, None if it stands."""
    try:
        with _quiet():
            return _UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # metadata that cannot be read; the pixels were
        return None


def _flatten_16(picture: Image.Image) -> Image.Image:
    samples = np.asarray(picture)  # uint16 [H, W]
    grey = _eight_bits(samples)
    key = picture.info.get("transparency")  # the one grey, in 16 bits, that is transparent
    if key is not None:
        grey[samples == key] = 255
    return Image.fromarray(grey).copy()


def _on_white(picture: Image.Image) -> Image.Image:
    """Composite on white as the reference does (alpha_composite), some rows at a time: in one piece it
    would hold three more copies of the picture."""
    width, height = picture.size
    flat = Image.new("RGB", picture.size)
    step = max(1, (1 << 20) // width)
    for top in range(0, height, step):
        band = picture.crop((0, top, width, min(top + step, height)))
        if band.mode == "La":  # Pillow has no direct way from premultiplied grey
            band = band.convert("LA")
        band = band.convert("RGBA")
        white = Image.new("RGBA", band.size, (255, 255, 255, 255))
        white.alpha_composite(band)
        flat.paste(white.convert("RGB"), (0, top))
    return flat


# ------------------------------------------------------------------------ patches (steps 2 to 5)


def patches(image: Source, budget: int = 280, *, max_pixels: int = MAX_PIXELS) -> ImagePatches:
    """Resize a picture to at most `budget` soft tokens and cut it into patches (spec 4.1, steps 1 to 5).

    image: what `open_image` takes, or what it returned.
    Bicubic with antialiasing on uint8, rounded to uint8 after each of the two passes: the bytes equal those
    of the reference's Pillow back end (spec 10 item 21).

    Raises InvalidRequest as `open_image` and `target_size` do.
    """
    picture = _decoded(image, max_pixels)
    turn = _turn(picture)
    width, height = picture.size if turn not in _SIDEWAYS else picture.size[::-1]
    h, w = target_size(height, width, budget)
    # all rows are brought to their width before any is dropped, so a line of 1 x 100,000,000 would fill 19 GB
    if (w, h) != (width, height) and w * height > max(max_pixels, w * h):
        raise InvalidRequest(
            f"A picture of {width} x {height:,} pixels is too narrow: at a width of {w} it has "
            f"{w * height:,} pixels, more than {max_pixels:,}. Cut it into pieces."
        )
    # a picture that is widened has little width, and Pillow may begin with its height
    flat = _narrowed(picture, turn, w) if w <= width else _upright(_flatten(picture), turn)
    mode = flat.mode
    small = flat.resize((w, h), Image.Resampling.BICUBIC).convert("RGB")
    rows, columns = h // PATCH, w // PATCH
    pixels = np.asarray(small).reshape(rows, PATCH, columns, PATCH, 3)
    pixels = pixels.transpose(0, 2, 1, 3, 4).reshape(rows * columns, PATCH * PATCH * 3)  # copies once
    # Hashing the patches, not the decoded picture, costs 2 MB instead of 36 MB for a phone's photo and is as
    # safe: the patches and their grid are all that the model sees.
    settings = (
        f"gemcut image: {mode} {width}x{height}; "
        f"budget {budget}, patch {PATCH}, pool {POOL}, bicubic, grid {rows}x{columns};"
    )
    sha = hashlib.sha256(settings.encode())
    sha.update(pixels.data)
    return ImagePatches(pixels, rows, columns, sha.digest())


def _narrowed(picture: Image.Image, turn: Image.Transpose | None, width: int) -> Image.Image:
    """The picture opaque, upright and of this width, L or RGB: the first pass of a resize.

    One band of rows at a time, so that a picture that is turned or transparent is not held twice. Pillow
    resizes in the same two passes and rounds after each, so the bytes are those of a resize in one piece:
    it begins with the width of what is not widened.
    """
    stored_width, stored_height = picture.size
    height = stored_width if turn in _SIDEWAYS else stored_height
    step = max(1, (1 << 20) * height // (stored_width * stored_height))
    narrow = None
    for top in range(0, height, step):
        # rows [top, bottom) of the upright picture, counted from the side that becomes its top
        bottom = min(top + step, height)
        first, last = (height - bottom, height - top) if turn in _FROM_THE_END else (top, bottom)
        box = (first, 0, last, stored_height) if turn in _SIDEWAYS else (0, first, stored_width, last)
        band = _upright(_flatten(picture.crop(box)), turn)
        band = band.resize((width, bottom - top), Image.Resampling.BICUBIC)
        if narrow is None:
            narrow = Image.new(band.mode, (width, height))
        narrow.paste(band, (0, top))
    assert narrow is not None, "a picture has a row"
    return narrow


# ---------------------------------------------------------------------------- pictures in messages


def from_part(part: Mapping[str, Any], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture of one content part of a message, opened. For callers who may read local files.

    Accepted, as OpenAI's and transformers' users write them:
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}, or the URL itself
        {"type": "image", "image": path | bytes | Pillow image | array | data URI}
        {"type": "image", "path": path}, {"type": "image", "base64": text}, {"type": "image", "url": data URI}

    No URL is fetched, and a URL never names a local file. Raises InvalidRequest with `param` set.
    """
    return _from_part(part, max_pixels, local=True)


def from_request_part(part: Mapping[str, Any], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """As `from_part`, for a part that came over a network: nothing in it can name a local file.

    Pictures are data URIs (`image_url`, `url`, `image`) or base64 text (`base64`).
    """
    return _from_part(part, max_pixels, local=False)


def part_source(part: Mapping[str, Any]) -> Source:
    """What `from_part` would open: the bytes of a file, a path, a Pillow image or an array."""
    return _part_source(part, local=True)


def request_part_source(part: Mapping[str, Any]) -> Source:
    """As `part_source`, for a part that came over a network: always bytes."""
    return _part_source(part, local=False)


def part_text(part: Mapping[str, Any]) -> str | None:
    """What a picture part of a message holds, if it is text: a URL, a data URI, base64. Raises InvalidRequest
    with `param` set if the part is none."""
    _, value = _picture_of(part)
    return value if isinstance(value, str) else None


def _from_part(part: Mapping[str, Any], max_pixels: int, *, local: bool) -> Image.Image:
    key, _ = _picture_of(part)
    source = _part_source(part, local=local)
    try:
        return open_image(source, max_pixels=max_pixels)
    except InvalidRequest as error:
        error.param = error.param or key
        raise


def _part_source(part: Mapping[str, Any], *, local: bool) -> Source:
    key, value = _picture_of(part)
    try:
        return _resolve(key, value, local=local)
    except InvalidRequest as error:
        error.param = error.param or key
        raise


def _picture_of(part: Mapping[str, Any]) -> tuple[str, Any]:
    """(key, value) of the one entry that holds the picture."""
    kind = part.get("type")
    given = {key: value for key, value in part.items() if key != "type" and value is not None}
    if kind == "image_url":
        keys = ("image_url",)
    elif kind == "image":
        keys = ("image", "url", "path", "base64")
    else:
        raise InvalidRequest(f"A part of type {kind!r} is no picture; use image_url or image.", param="type")
    unknown = sorted(str(key) for key in given if key not in keys)
    if unknown:
        raise InvalidRequest(f"A part of type {kind} has no field {unknown[0]!r}.", param=unknown[0])
    if len(given) != 1:
        raise InvalidRequest(
            f"A part of type {kind} needs one of {', '.join(keys)}; it has {', '.join(given) or 'none'}.",
            param=keys[0],
        )
    ((key, value),) = given.items()
    if key == "image_url" and isinstance(value, Mapping):
        unknown = sorted(str(name) for name in value if name not in ("url", "detail"))
        if unknown:
            raise InvalidRequest(f"image_url has no field {unknown[0]!r}.", param=f"image_url.{unknown[0]}")
        if value.get("detail") not in (None, "auto"):
            raise InvalidRequest(
                f"image_url.detail {value['detail']!r} is not supported; leave it out and set "
                f"max_soft_tokens to one of {', '.join(map(str, SOFT_TOKEN_BUDGETS))}.",
                param="image_url.detail",
            )
        key, value = "image_url.url", value.get("url")
    return key, value


def _resolve(key: str, value: Any, *, local: bool) -> Source:
    """What `open_image` shall open."""
    if isinstance(value, str):
        scheme = value[: value.find(":")].lower() if ":" in value[:16] else ""
        if key == "path":
            if local:
                return value
            raise InvalidRequest("A request cannot name a local file; send the picture as a data URI.")
        if scheme == "data":
            return _data_uri(value)
        if key == "base64":
            return _base64(value)
        if scheme in ("http", "https"):
            raise InvalidRequest(
                f"Fetching is off, so {scheme} URLs are refused; send the picture itself as a data URI "
                "(data:image/png;base64,...)."
            )
        if key == "image" and local and not value[:7].lower().startswith("file://"):
            return value
        remedy = (
            'or name a local file with {"type": "image", "path": ...}' if local else "no file is read here"
        )
        raise InvalidRequest(
            f"{key} must be a data URI (data:image/png;base64,...); it begins with {value[:24]!r}, {remedy}."
        )
    if local and (key == "image" or (key == "path" and isinstance(value, os.PathLike))):
        return value
    raise InvalidRequest(f"{key} must be text; it is {type(value).__name__}.")


def _data_uri(uri: str) -> bytes:
    comma = uri.find(",", 0, 256)
    if comma < 0:
        raise InvalidRequest(
            "The data URI has no comma after its media type; write data:image/png;base64,..."
        )
    media_type, *parameters = uri[len("data:") : comma].split(";")
    if not media_type.lower().startswith("image/"):
        raise InvalidRequest(f"The data URI's media type is {media_type!r}; it must be image/...")
    if not parameters or parameters[-1].strip().lower() != "base64":
        raise InvalidRequest("The data URI is not base64; write data:image/png;base64,...")
    return _base64(uri[comma + 1 :])


def _base64(text: str) -> bytes:
    size = len(text) // 4 * 3
    if size > MAX_BYTES + 2:  # up to two of the three last bytes may be padding
        raise InvalidRequest(f"The picture has about {size:,} bytes; at most {MAX_BYTES:,} are accepted.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: text that is not ASCII
        raise InvalidRequest(
            f"The picture's base64 text ({len(text):,} characters) is not valid: it needs the standard "
            "alphabet, no spaces or line ends, and its padding."
        ) from error
