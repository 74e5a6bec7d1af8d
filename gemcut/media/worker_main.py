"""`python -m gemcut.media.worker_main`: one worker process of `workers.MediaWorkers`."""

from __future__ import annotations

from collections.abc import Sequence

from gemcut.errors import InvalidRequest
from gemcut.media.image import MAX_PIXELS, patches
from gemcut.media.workers import DONE, JOB, REFUSED
from gemcut.worker_pool import Buffer, ChildLimits, Handler, serve

# The largest picture that is taken needs about 16 bytes a pixel: decoded twice for transparency, 16-bit
# samples, and the pass of a resize. Python, numpy and Pillow map less than 0.5 GB.
MEMORY_BYTES = (512 << 20) + 24 * MAX_PIXELS


def answer(frame: memoryview) -> Sequence[Buffer]:
    """The patches of one picture, or why there are none."""
    budget, max_pixels = JOB.unpack_from(frame)
    try:
        picture = patches(frame[JOB.size :], budget, max_pixels=max_pixels)
    except InvalidRequest as error:
        return _refuse(str(error), error.param)
    except MemoryError:
        size = len(frame) - JOB.size
        return _refuse(
            f"Decoding the picture of {size:,} bytes needs more than the {MEMORY_BYTES:,} bytes of memory "
            "that a picture may take. Send a smaller one.",
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
    serve(start, ChildLimits(memory_bytes=MEMORY_BYTES, cpu_s=60.0))
