"""Ids -> text and control pieces, as they come from the model.

Enters: token ids one by one. Leaves: `Text` and `Control` pieces whose concatenation equals what the
tokenizers library decodes from all ids at once. It must not know what the pieces mean.

A piece never ends inside a character: bytes wait until they form one, or until they no longer can.
Each token is decoded once, by small stages that stand for the decoders of tokenizer.json.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gemcut.data import Control, Text
from gemcut.errors import CheckpointError

Piece = Text | Control
# stand-in for a control token inside the stages: it ends runs of bytes and the start of the text
_BOUNDARY = None


class Stage(Protocol):
    """One decoder of a chain. It takes the token's string and gives the strings that are now certain."""

    def push(self, token: str | None) -> list[str]: ...

    def flush(self) -> list[str]: ...


class Detokenizer:
    """Incremental detokenizer of one reply."""

    def __init__(
        self,
        tokens: Sequence[str | None],
        control_ids: Collection[int],
        decoder: Sequence[Callable[[], Stage]],
    ) -> None:
        self._tokens = tokens
        self._control_ids = control_ids
        self._stages = [make() for make in decoder]

    def push(self, token_id: int) -> list[Piece]:
        """The pieces that `token_id` completes: none, a text, a control, or a text and a control."""
        token = self._tokens[token_id] if 0 <= token_id < len(self._tokens) else None
        if token is None:
            return []  # a row of the logits beyond the vocabulary: the library skips it as well
        if token_id not in self._control_ids:
            return _as_text(self._run(token, 0))
        return [*_as_text(self._run(_BOUNDARY, 0)), Control(token)]

    def flush(self) -> list[Piece]:
        """The rest, at the end of the reply. Bytes that never became a character are U+FFFD."""
        rest: list[str] = []
        for i, stage in enumerate(self._stages):
            for text in stage.flush():
                rest += self._run(text, i + 1)
        return _as_text(rest)

    def _run(self, token: str | None, first: int) -> list[str]:
        """Send one string, or a boundary, through the stages from `first` on."""
        strings = [token]
        for stage in self._stages[first:]:
            out: list[str | None] = []
            for string in strings:
                out += stage.push(string)
                if string is _BOUNDARY:
                    out.append(_BOUNDARY)
            strings = out
        return [string for string in strings if string is not None]


def check_decoder(spec: Mapping[str, Any] | None, path: Path) -> list[Callable[[], Stage]]:
    """The stages for the `decoder` of a tokenizer.json, as constructors: every reply needs its own."""
    parts = spec.get("decoders", []) if spec and spec.get("type") == "Sequence" else [spec]
    stages: list[Callable[[], Stage]] = []
    fused = False
    for part in parts:
        part = part if isinstance(part, Mapping) else {}
        kind = part.get("type")
        pattern = part.get("pattern", {}).get("String")
        if kind == "Replace" and not fused and pattern:
            stages.append(_maker(_Replace, pattern, part["content"]))
        elif kind == "ByteFallback" and not fused:
            stages.append(_ByteFallback)
        elif kind == "ByteLevel" and len(parts) == 1:
            stages.append(_ByteLevel)
        elif kind == "Fuse":
            fused = True  # from here on the library sees one string; so do we, as it grows
        elif kind == "Strip" and fused and part["stop"] == 0:
            stages.append(_maker(_StripStart, part["content"], part["start"]))
        else:
            raise CheckpointError(
                f"{path} decodes with {dict(part) or 'no decoder'}, here not supported. Supported are "
                "ByteLevel, or a Sequence of Replace, ByteFallback, Fuse and a Strip of the start."
            )
    return stages


def token_bytes(spec: Mapping[str, Any] | None, token: str) -> bytes | None:
    """What one token that is no control stands for, under the `decoder` of a tokenizer.json that
    `check_decoder` took. None if that depends on where the token stands."""
    assert spec is not None, "the decoder was checked"
    for part in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
        kind = part["type"]
        if kind == "Replace":
            token = token.replace(part["pattern"]["String"], part["content"])
        elif kind == "ByteFallback" and (byte := _ByteFallback._BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        elif kind == "ByteLevel":
            return _from_alphabet(token)
        elif kind == "Strip":
            return None
    return token.encode()


class _Replace:
    """Replace inside each token, `▁` by a space."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern, self._content = pattern, content

    def push(self, token: str | None) -> list[str]:
        return [] if token is None else [token.replace(self._pattern, self._content)]

    def flush(self) -> list[str]:
        return []


class _ByteFallback:
    """Join runs of byte tokens.

    The library turns a run into text as a whole: one bad byte makes every byte of the run a U+FFFD. So a
    run is held until another token ends it, even where its first characters are complete: what has been
    sent cannot be taken back. Runs are short, a byte token stands for a character outside the vocabulary.
    """

    _BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, token: str | None) -> list[str]:
        byte = self._BYTE.fullmatch(token) if token else None
        if byte:
            self._run.append(int(byte[1], 16))
            return []
        return self.flush() if token is None else [*self.flush(), token]

    def flush(self) -> list[str]:
        run, self._run = bytes(self._run), bytearray()
        try:
            return [run.decode()] if run else []
        except UnicodeDecodeError:
            return ["\ufffd" * len(run)]


class _ByteLevel:
    """Letters of the byte alphabet back to bytes, bytes to characters as soon as these are complete."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: str | None) -> list[str]:
        if token is None:
            return self.flush()
        return [self._utf8.decode(_from_alphabet(token))]

    def flush(self) -> list[str]:
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return [rest] if rest else []


class _StripStart:
    """Drop up to `count` times `content` at the start of the reply."""

    def __init__(self, content: str, count: int) -> None:
        self._content, self._left = content, count

    def push(self, token: str | None) -> list[str]:
        if token is None:
            self._left = 0
            return []
        while self._left and token.startswith(self._content):
            token = token.removeprefix(self._content)
            self._left -= 1
        if token:
            self._left = 0
        return [token]

    def flush(self) -> list[str]:
        return []


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, the rest for U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _from_alphabet(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[letter] for letter in token])
    except KeyError:  # an added token, spelled in plain letters
        return token.encode()


def _maker(stage: Callable[..., Stage], *arguments: Any) -> Callable[[], Stage]:
    return lambda: stage(*arguments)


def _as_text(strings: Sequence[str]) -> list[Piece]:
    text = "".join(strings)
    return [Text(text)] if text else []
