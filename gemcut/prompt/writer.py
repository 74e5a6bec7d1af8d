"""Segments, in the order in which a template writes them.

Enters: text, control spellings and media parts. Leaves: merged segments and the media in slot order.
It must not know what a message is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gemcut.data import Control, MediaKind, Segment, Slot, Text

QUOTE = '<|"|>'
PLACEHOLDERS: dict[MediaKind, str] = {"image": "<|image|>", "audio": "<|audio|>", "video": "<|video|>"}


@dataclass(frozen=True, slots=True)
class MediaPart:
    """One medium as the caller sent it. `param` is its path in the request, for error messages."""

    kind: MediaKind
    part: Mapping[str, Any]
    param: str


class SegmentWriter:
    """Collects segments. Text written in a row becomes one `Text`; media are numbered as they come."""

    def __init__(self) -> None:
        self.media: list[MediaPart] = []
        self._segments: list[Segment] = []
        self._pending: list[str] = []  # joined once, so that many small writes stay linear

    def text(self, text: str) -> None:
        """Write literal text."""
        if text:
            self._pending.append(text)

    def control(self, token: str) -> None:
        """Write one control token."""
        self._close_text()
        self._segments.append(Control(token))

    def quoted(self, text: str) -> None:
        """Write a string value between two quote tokens. Nothing inside is escaped (spec 6.3)."""
        self.control(QUOTE)
        self.text(text)
        self.control(QUOTE)

    def slot(self, medium: MediaPart) -> None:
        """Write the place of one medium and remember the medium under the slot's index."""
        self._close_text()
        self._segments.append(Slot(medium.kind, len(self.media)))
        self.media.append(medium)

    def segments(self) -> list[Segment]:
        """Everything written so far."""
        self._close_text()
        return list(self._segments)

    def _close_text(self) -> None:
        if self._pending:
            self._segments.append(Text("".join(self._pending)))
            self._pending.clear()


def spell(segments: Iterable[Segment]) -> str:
    """The prompt as one string: controls spelled, each medium as its single placeholder.

    For people and for parity tests. It cannot be turned back into segments: a user may write the same
    letters.
    """
    return "".join(
        segment.text
        if isinstance(segment, Text)
        else segment.token
        if isinstance(segment, Control)
        else PLACEHOLDERS[segment.kind]
        for segment in segments
    )
