"""`python -m gemcut.media.worker_main`: one worker process of `workers.MediaWorkers`."""

from __future__ import annotations

from collections.abc import Sequence

from gemcut.errors import InvalidRequest
from gemcut.media.image import patches
from gemcut.media.workers import DONE, JOB, REFUSED
from gemcut.worker_pool import Buffer, ChildLimits, Handler, serve

# For one picture, its file included. A pixel takes, as measured: JPEG and PNG 5 bytes (50 megapixels fit),
# grey 1.5, progressive JPEG 7 to 10, WebP 17 (15 megapixels), 16-bit colour 20.
PICTURE_BYTES = 256 << 20
WEBP_PIXELS = 15_000_000  # its decoder calls a picture damaged that it has no memory for


def answer(frame: memoryview) -> Sequence[Buffer]:
    """The patches of one picture, or why there are none."""
    budget, max_pixels = JOB.unpack_from(frame)
    if frame[JOB.size + 8 : JOB.size + 12] == b"WEBP":
        max_pixels = min(max_pixels, WEBP_PIXELS)
    try:
        picture = patches(frame[JOB.size :], budget, max_pixels=max_pixels)
    except InvalidRequest as error:
        return _refuse(str(error), error.param)
    except MemoryError:
        size = len(frame) - JOB.size
        return _refuse(
            f"Decoding the picture of {size:,} bytes needs more than the {PICTURE_BYTES >> 20} MB of memory "
            "that a picture may take. Send a smaller one; JPEG takes the least for its size.",
            None,
        )
    return DONE.pack(0, picture.rows, picture.columns, picture.digest), picture.pixels.data.cast("B")


def _refuse(message: str, param: str | None) -> Sequence[Buffer]:
    text = message.encode(errors="backslashreplace")
    return REFUSED.pack(1, param is not None, len(text)), text, (param or "").encode()


def start(_: memoryview) -> Handler:
    """Ready as soon as it is imported: Pillow's four plugins were loaded with `image`."""
    return answer


if __name__ == "__main__":
    serve(start, ChildLimits(growth_bytes=PICTURE_BYTES, cpu_s=60.0))
