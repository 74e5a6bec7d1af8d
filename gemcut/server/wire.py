"""What front end and engine process say to each other: msgpack frames of a fixed schema, over a Unix socket.

A frame is its length in four bytes and one message. A frame that is no message of the schema is dropped and
counted; nothing is ever unpickled. Only these two ends know the format, and both come from one installation.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec
import numpy as np

from gemcut.config import EngineConfig
from gemcut.data import PATCH, POOL, ImagePatches, Prompt, Span
from gemcut.engine.loop import Job
from gemcut.engine.model_files import ChatPrompt
from gemcut.errors import GemcutError, InvalidRequest, Overloaded
from gemcut.outputs import Delta, RequestOutput, Stats
from gemcut.sampling import SamplingParams

HEAD = struct.Struct("<I")
MAX_FRAME = 1 << 30  # far beyond the largest request that the front end lets in
_PATCH_BYTES = PATCH * PATCH * 3


class Fixed(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Values in a fixed order, no more and no fewer."""


class Picture(Fixed, frozen=True):
    """`ImagePatches`, its pixels as bytes."""

    pixels: memoryview
    rows: int
    columns: int
    digest: bytes


# ---- to the engine


class Start(Fixed, tag="start", frozen=True):
    """The first frame. max_waiting: requests that may wait in the engine."""

    config: EngineConfig
    max_waiting: int


class Submit(Fixed, tag="submit", frozen=True):
    """A `Job`. streamed: deltas are wanted, not only the whole output."""

    request_id: str
    token_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    media: tuple[Picture, ...]
    in_thought: bool
    may_think: bool
    params: SamplingParams
    chat: bool
    priority: int
    deadline_s: float | None
    salt: bytes
    streamed: bool


class Abort(Fixed, tag="abort", frozen=True):
    """End a job."""

    request_id: str


class Ping(Fixed, tag="ping", frozen=True):
    """Are you there?"""


class Quit(Fixed, tag="quit", frozen=True):
    """End the process."""


# ---- to the front end


class Started(Fixed, tag="started", frozen=True):
    """Weights are loaded and one forward pass is done. used: `runner.start.Used`, as text for logs."""

    max_model_len: int
    used: dict[str, str]


class Failed(Fixed, tag="failed", frozen=True):
    """The engine's last words. kind: the error's class; "crash" for an exception that is nobody's."""

    kind: str
    message: str


class News(Fixed, tag="news", frozen=True):
    """Deltas of one step, and the outputs of jobs that ended with it."""

    deltas: tuple[tuple[str, Delta], ...]
    outputs: tuple[RequestOutput, ...]


class Refused(Fixed, tag="refused", frozen=True):
    """A job that the engine does not take. Read it with `refusal`."""

    request_id: str
    kind: str
    message: str
    param: str | None = None
    retry_after_s: float = 0.0


class Pong(Fixed, tag="pong", frozen=True):
    """The answer to a ping. step_s: how long the present step has been going on, 0 between steps."""

    stats: Stats
    step_s: float
    bad_frames: int


ToEngine = Start | Submit | Abort | Ping | Quit
ToFrontEnd = Started | Failed | News | Refused | Pong

_encode = msgspec.msgpack.Encoder().encode
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_to_front_end = msgspec.msgpack.Decoder(ToFrontEnd)


class BadFrame(Exception):
    """Bytes that are no message."""


def frame(message: ToEngine | ToFrontEnd) -> tuple[bytes, bytes]:
    """Head and body of a message."""
    body = _encode(message)
    return HEAD.pack(len(body)), body


def read_order(body: bytes | bytearray) -> ToEngine:
    """A message to the engine. Raises BadFrame."""
    try:
        return _to_engine.decode(body)
    except (msgspec.MsgspecError, GemcutError, RecursionError, ValueError) as error:
        raise BadFrame(str(error)) from error


def read_answer(body: bytes | bytearray) -> ToFrontEnd:
    """A message to the front end. Raises BadFrame."""
    try:
        return _to_front_end.decode(body)
    except (msgspec.MsgspecError, GemcutError, RecursionError, ValueError) as error:
        raise BadFrame(str(error)) from error


def write_job(job: Job, streamed: bool) -> Submit:
    """A job as a message."""
    return Submit(
        request_id=job.request_id,
        token_ids=job.prompt.prompt.token_ids,
        spans=job.prompt.prompt.spans,
        media=tuple(
            Picture(m.pixels.reshape(-1).data, m.rows, m.columns, m.digest) for m in job.prompt.media
        ),
        in_thought=job.prompt.in_thought,
        may_think=job.prompt.may_think,
        params=job.params,
        chat=job.chat,
        priority=job.priority,
        deadline_s=job.deadline_s,
        salt=job.salt,
        streamed=streamed,
    )


def read_job(message: Submit) -> Job:
    """The job of a message. Raises BadFrame for pictures that are not what they say."""
    return Job(
        request_id=message.request_id,
        prompt=ChatPrompt(
            Prompt(message.token_ids, message.spans),
            _pictures(message.media),
            message.in_thought,
            message.may_think,
        ),
        params=message.params,
        chat=message.chat,
        priority=message.priority,
        deadline_s=message.deadline_s,
        salt=message.salt,
    )


def _pictures(media: Sequence[Picture]) -> tuple[ImagePatches, ...]:
    pictures = []
    for m in media:
        count = m.rows * m.columns
        whole = m.rows > 0 and m.columns > 0 and m.rows % POOL == 0 == m.columns % POOL
        if not whole or len(m.pixels) != count * _PATCH_BYTES or len(m.digest) != 32:
            raise BadFrame(f"a picture of {len(m.pixels)} bytes for {m.rows} x {m.columns} patches")
        pixels = np.frombuffer(m.pixels, np.uint8).reshape(count, _PATCH_BYTES)
        pictures.append(ImagePatches(pixels, m.rows, m.columns, m.digest))
    return tuple(pictures)


def write_refusal(request_id: str, error: GemcutError) -> Refused:
    """A refusal as a message."""
    return Refused(
        request_id=request_id,
        kind=type(error).__name__,
        message=str(error),
        param=error.param if isinstance(error, InvalidRequest) else None,
        retry_after_s=error.retry_after_s if isinstance(error, Overloaded) else 0.0,
    )


def refusal(message: Refused) -> GemcutError:
    """The error that a refusal stands for."""
    if message.kind == "InvalidRequest":
        return InvalidRequest(message.message, message.param)
    if message.kind == "Overloaded":
        return Overloaded(message.message, message.retry_after_s)
    return GemcutError(message.message)
