"""The nouns that the rooms hand to one another. No behaviour beyond what a noun knows about itself.

A conversation is rendered to segments, segments and media are encoded to a `Prompt`, and a
prompt's `Span`s say which positions hold which medium's soft tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
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
