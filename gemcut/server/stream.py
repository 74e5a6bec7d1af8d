"""Deltas -> server-sent events of OpenAI's chunks.

A chunk is put together from bytes that are the same for the whole stream and the little that changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemcut.server.exchange import encode

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def event(payload: Any) -> bytes:
    """One event without a name."""
    return b"data: " + encode(payload) + b"\n\n"


def named_event(name: str, payload: Any) -> bytes:
    """One event with a name, as Anthropic's and the Responses interface have them."""
    return b"event: " + name.encode() + b"\ndata: " + encode(payload) + b"\n\n"


class Chunks:
    """The chunks of one stream. usage_null: each but the last bears `"usage": null`."""

    def __init__(self, head: Mapping[str, Any], *, usage_null: bool) -> None:
        opened = encode(head)[:-1]
        self._before = b"data: " + opened + b',"choices":['
        self._after = b'],"usage":null}\n\n' if usage_null else b"]}\n\n"
        before, after = (piece.replace(b"%", b"%%") for piece in (self._before, self._after))
        choice = b'{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}'
        self._text = before + choice + after

    def choice(self, choice: Mapping[str, Any]) -> bytes:
        """A chunk with news of one answer."""
        return self._before + encode(choice) + self._after

    def text(self, index: int, text: str) -> bytes:
        """A chunk of a chat with more text of one answer and nothing else, which most of them are."""
        return self._text % (index, encode(text))

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """The chunk without an answer, with the usage."""
        return self._before + b'],"usage":' + encode(usage) + b"}\n\n"
