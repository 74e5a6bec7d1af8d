"""The nouns that the rooms hand to one another. No behaviour beyond what a noun knows about itself.

A conversation is rendered to segments, segments and media are encoded to a `Prompt`, and a
prompt's `Span`s say which positions hold which medium's soft tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

MediaKind = Literal["image", "video", "audio"]

SOFT_TOKEN_BUDGETS = (70, 140, 280, 560, 1120)  # spec 4.1; the processor admits no other
PATCH = 16  # pixels a side
POOL = 3  # patches a side that one soft token covers


@dataclass(frozen=True, slots=True)
class Text:
    """Literal text. It is encoded with control tokens off, whatever it contains."""

    text: str


@dataclass(frozen=True, slots=True)
class Control:
    """One control token by its spelling, for example `<|turn>`."""

    token: str


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one medium. `index` counts the conversation's media of all kinds from 0."""

    kind: MediaKind
    index: int


Segment = Text | Control | Slot


@dataclass(frozen=True, slots=True)
class Span:
    """Positions [start, stop) of a prompt that hold the soft tokens of medium `index`."""

    kind: MediaKind
    index: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads: token ids with each medium's placeholders in place, and their spans."""

    token_ids: tuple[int, ...]
    spans: tuple[Span, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, eq=False, slots=True)
class ImagePatches:
    """One picture after decoding and resizing (spec 4.1, steps 1 to 5).

    pixels: uint8 [N, 768], N = rows * columns patches of 16 x 16 pixels in row-major order; within
        a patch the order is (y, x, channel). The model scales them (spec 4.2), so a picture travels
        as bytes, a quarter of its fp32 size.
    rows, columns: the patch grid, both multiples of 3.
    digest: SHA-256 over mode, shape, pixels and processor settings: the picture's identity in caches.
    """

    pixels: np.ndarray
    rows: int
    columns: int
    digest: bytes

    @property
    def soft_tokens(self) -> int:
        return self.rows * self.columns // (POOL * POOL)

    def positions(self) -> np.ndarray:
        """int32 [N, 2]: the (x, y) of every patch, that is (column, row)."""
        y, x = np.divmod(np.arange(self.rows * self.columns, dtype=np.int32), self.columns)
        return np.stack([x, y], axis=-1).astype(np.int32)


def pixel_values() -> np.ndarray:
    """fp32 [256]: what each byte of a picture is worth to the model (spec 4.1 step 4).

    The reference multiplies by 1/255 in fp64 and rounds once to fp32. In fp32 throughout, 126 of the 256
    values would differ in the last bit.
    """
    return (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)


Medium = ImagePatches  # what one encoder call reads; other kinds join here


# Engine and runner meet in the nouns below: bytes, integers and ids, never a tensor.


@dataclass(frozen=True, slots=True)
class MediaSpan:
    """Positions [start, stop) take the soft tokens of the encoder-cache entry `key`: position p takes
    its row p - start."""

    kind: MediaKind
    key: bytes
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class EncodeItem:
    """Encode `medium` in this step and keep the soft tokens under `key` until the key is freed."""

    kind: MediaKind
    key: bytes
    medium: Medium


@dataclass(frozen=True, slots=True)
class Seat:
    """A sequence takes a row slot, new or back from preemption: what the slot held before is void.

    `token_ids` are all that are known, prompt and generated, also those whose KV comes from the
    prefix cache; the first `num_prompt` are the prompt. `sampling` passes through the scheduler unread.
    """

    slot: int
    request_id: str
    token_ids: tuple[int, ...]
    num_prompt: int
    sampling: object = None


@dataclass(frozen=True, slots=True)
class PageRun:
    """Entries [index, index + len(pages)) of a slot's page table. Entry i serves the positions from
    i * page_size on."""

    index: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence in a step: positions [start, start + count) are computed.

    token_ids: the chunk's ids; None is a decode row, whose one id is the slot's last sampled one,
        which is still on the device.
    samples: the last position's logits are sampled from.
    full_pages, sliding_pages: what joins the slot's page tables before the step, None if nothing
        does. With a `Seat` in the same step it is the whole table: entries that it does not name
        are -1 (in the sliding table those below the window). Entries that the window has left are
        given to others without notice and are never to be read: a query at q reads positions
        [q - window + 1, q], within a vision block to the block's end.
    spans: every media span that overlaps the chunk, whole.
    """

    slot: int
    start: int
    count: int
    token_ids: tuple[int, ...] | None
    samples: bool
    full_pages: PageRun | None = None
    sliding_pages: PageRun | None = None
    spans: tuple[MediaSpan, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One forward, in this order: drop `free_media`, encode, seat, run the rows, sample."""

    number: int
    rows: tuple[Row, ...]
    seats: tuple[Seat, ...] = ()
    encode: tuple[EncodeItem, ...] = ()
    free_media: tuple[bytes, ...] = ()


@dataclass(slots=True)
class ForwardCounts:
    """Which way a runner's forwards took since it started: `replays` of graphs by kind, `eager` ones by
    reason, and the graphs that it went without, `dropped`, by reason."""

    replays: Counter[str] = field(default_factory=Counter)
    eager: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's log-probability and rank (1 is the likeliest) under the model, before penalties and
    temperature, and the likeliest tokens with theirs."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]

    def first(self, k: int) -> TokenLogprobs:
        """The same with the k likeliest only."""
        return replace(self, top=self.top[:k])


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a step. `tokens`: slot -> sampled id, of every row that samples and did not fail.
    `errors`: slot -> why the row failed; it ends its request and nobody else's. `logprobs`: of the
    sampled tokens, for the rows that ask. `prompt_logprobs`: of the prompt tokens after the chunk's."""

    number: int
    tokens: Mapping[int, int]
    errors: Mapping[int, str] = field(default_factory=dict)
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
