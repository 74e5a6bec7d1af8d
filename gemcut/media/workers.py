"""Pictures decoded in worker processes: what a hostile file can do, it does to a process that can be killed.

Enters: what `image.patches` takes, or media parts of messages. Leaves: `ImagePatches`, byte for byte those of
`image.patches`. The other end is `worker_main`.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, Self

import numpy as np

from gemcut.data import PATCH, POOL, ImagePatches
from gemcut.errors import InvalidRequest
from gemcut.media.image import (
    MAX_PIXELS,
    Source,
    file_bytes,
    part_source,
    patches,
    request_part_source,
)
from gemcut.worker_pool import WorkerDied, WorkerOverran, WorkerPool

CHILD = "gemcut.media.worker_main"

# A job is JOB and the file's bytes. Its answer is DONE and the pixels; or REFUSED, whether there is a param,
# the length of the message, and both as UTF-8.
JOB = struct.Struct("<IQ")  # soft tokens at most, pixels at most
DONE = struct.Struct("<BII32s")  # 0, rows, columns, digest
REFUSED = struct.Struct("<B?I")  # 1
_PATCH_BYTES = PATCH * PATCH * 3


class MediaPart(Protocol):
    """A media part of a message (`prompt.writer.MediaPart`). `param`: where in the request it stands."""

    @property
    def kind(self) -> str: ...
    @property
    def part(self) -> Mapping[str, Any]: ...
    @property
    def param(self) -> str: ...


class MediaWorkers:
    """A pool of processes that decode, resize and cut pictures. Safe to use from several threads.

    Nothing is started before the first picture that has to be decoded. count: processes, by default one for
    each core and at most 4. deadline_s: for one picture; the process of one that takes longer is killed, as
    one that crashes is replaced, and that picture alone is an InvalidRequest.
    """

    def __init__(
        self,
        count: int | None = None,
        deadline_s: float = 5.0,
        *,
        max_pixels: int = MAX_PIXELS,
        max_waiting: int = 256,
    ) -> None:
        self._max_pixels = max_pixels
        self._pool = WorkerPool(
            CHILD,
            count=count or min(4, os.cpu_count() or 1),
            deadline_s=deadline_s,
            max_waiting=max_waiting,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; pictures that run or wait fail. May be called again."""
        self._pool.close()

    def pids(self) -> list[int]:
        """Ids of the processes that are there now."""
        return self._pool.pids()

    def patches(self, source: Source, budget: int = 280) -> Future[ImagePatches]:
        """The patches of one picture; takes what `image.patches` takes, and raises the same.

        A file is read here and decoded in a worker. A Pillow image or an array is decoded already, and is
        cut here and now: it would take longer to send. With asyncio: `await asyncio.wrap_future(...)`.
        What is wrong with the picture is raised by the future; Overloaded, if too much waits, at once.
        """
        result: Future[ImagePatches] = Future()
        try:
            data = file_bytes(source)
            if data is None:
                result.set_result(patches(source, budget, max_pixels=self._max_pixels))
                return result
        except InvalidRequest as error:
            result.set_exception(error)
            return result
        size = memoryview(data).nbytes
        answer = self._pool.submit([JOB.pack(_unsigned(budget), self._max_pixels), data])

        def cancel(future: Future[ImagePatches]) -> None:
            if future.cancelled():
                answer.cancel()

        def finish(future: Future[bytearray]) -> None:
            if future.cancelled() or not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(_read_answer(future.result()))
            except (WorkerDied, WorkerOverran) as error:
                result.set_exception(_blame(error, size))
            except BaseException as error:
                result.set_exception(error)

        result.add_done_callback(cancel)
        answer.add_done_callback(finish)
        return result

    def load(self, parts: Sequence[MediaPart], budget: int) -> list[ImagePatches]:
        """The pictures of a conversation, in order; local files may be named. Blocks; several at a time.

        As `engine.model_files.load_pictures`: InvalidRequest bears the `param` of its part.
        """
        return self._load(parts, budget, part_source)

    def load_request(self, parts: Sequence[MediaPart], budget: int) -> list[ImagePatches]:
        """As `load`, for parts that came over a network: no part can name a local file."""
        return self._load(parts, budget, request_part_source)

    def _load(
        self, parts: Sequence[MediaPart], budget: int, source_of: Callable[[Mapping[str, Any]], Source]
    ) -> list[ImagePatches]:
        for part in parts:
            if part.kind != "image":
                raise InvalidRequest(
                    f"gemcut takes no {part.kind} yet; it takes text and pictures.", part.param
                )
        ahead = 2 * self._pool.count  # enough to keep all busy; no more files are held in memory
        waiting: deque[tuple[MediaPart, Future[ImagePatches]]] = deque()
        loaded: list[ImagePatches] = []
        try:
            for part in parts:
                if len(waiting) == ahead:
                    loaded.append(_named(*waiting.popleft()))
                try:
                    waiting.append((part, self.patches(source_of(part.part), budget)))
                except InvalidRequest as error:
                    error.param = part.param
                    raise
            while waiting:
                loaded.append(_named(*waiting.popleft()))
        finally:
            for _, future in waiting:
                future.cancel()
        return loaded


def _named(part: MediaPart, future: Future[ImagePatches]) -> ImagePatches:
    try:
        return future.result()
    except InvalidRequest as error:
        error.param = part.param
        raise


def _unsigned(budget: int) -> int:
    """A budget that fits its field; what is no budget is for the worker to refuse."""
    return budget if 0 <= budget < 1 << 32 else 0


def _read_answer(frame: bytearray) -> ImagePatches:
    if frame[0] == 1:
        _, has_param, length = REFUSED.unpack_from(frame)
        words = frame[REFUSED.size :]
        raise InvalidRequest(words[:length].decode(), words[length:].decode() if has_param else None)
    _, rows, columns, digest = DONE.unpack_from(frame)
    pixels = np.frombuffer(frame, np.uint8, offset=DONE.size)
    whole = rows % POOL == columns % POOL == 0 and pixels.size == rows * columns * _PATCH_BYTES
    assert whole, f"a worker sent {pixels.size} bytes for {rows} x {columns} patches"
    return ImagePatches(pixels.reshape(rows * columns, _PATCH_BYTES), rows, columns, digest)


def _blame(error: WorkerDied | WorkerOverran, size: int) -> InvalidRequest:
    if isinstance(error, WorkerOverran):
        return InvalidRequest(
            f"Decoding the picture of {size:,} bytes took longer than {error.deadline_s:g} s and was ended. "
            "Send a smaller one."
        )
    return InvalidRequest(
        f"The process that decoded the picture of {size:,} bytes ended ({error.cause}): the file is damaged, "
        "or needs too much memory. Send a smaller one, or save it anew."
    )
