"""The inside of one tool call, `call:NAME{key:value,...}`, to a name and Python values (spec 6.4).

Enters: the pieces between `<|tool_call>` and `<tool_call|>`. Leaves: a name and arguments, or the reason
why they cannot be read. Only the control token `<|"|>` quotes; the same letters in a text are text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from gemcut.data import Control, Text
from gemcut.prompt.writer import QUOTE

MAX_DEPTH = 64
# no leading zeros, as in JSON: 007 and 01234 are codes, whose zeros a number would lose
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,3999})")  # Python converts no more than 4,300 digits
_FLOAT = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]*|(?=[eE]))|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None}
_PREFIX = "call:"


class MalformedArguments(Exception):
    """The call cannot be read. The message says why."""


def call_name(text: str) -> str:
    """The name in the text before the first brace."""
    head = text.partition("{")[0]
    if not head.startswith(_PREFIX):
        raise MalformedArguments(f"a call must start with {_PREFIX!r}")
    name = head.removeprefix(_PREFIX).strip()
    if not name:
        raise MalformedArguments("the function has no name")
    return name


def parse_call(pieces: Sequence[Text | Control]) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a whole call."""
    reader = _Reader(pieces)
    head = reader.until("{")
    name = call_name(head)
    if reader.peek() != "{":
        raise MalformedArguments("the arguments never start: there is no brace after the name")
    arguments = reader.mapping(0)
    reader.skip_space()
    if reader.peek():
        raise MalformedArguments(f"{reader.rest()[:40]!r} follows the arguments")
    return name, arguments


class _Reader:
    """Recursive descent over the pieces. A quoted string is one item, every other letter is one."""

    def __init__(self, pieces: Sequence[Text | Control]) -> None:
        self._items: list[str | Text] = []  # letters, and quoted strings as Text
        quoted: list[str] | None = None
        for piece in pieces:
            if piece == Control(QUOTE):
                if quoted is not None:
                    self._items.append(Text("".join(quoted)))
                quoted = [] if quoted is None else None
            elif quoted is not None:
                quoted.append(piece.text if isinstance(piece, Text) else piece.token)
            elif isinstance(piece, Text):
                self._items += piece.text
            else:
                raise MalformedArguments(f"{piece.token} stands outside of a string")
        if quoted is not None:
            raise MalformedArguments(f"a string has no closing {QUOTE}")
        self._at = 0

    def peek(self) -> str | Text:
        return self._items[self._at] if self._at < len(self._items) else ""

    def rest(self) -> str:
        return "".join(i if isinstance(i, str) else QUOTE + i.text + QUOTE for i in self._items[self._at :])

    def until(self, stops: str) -> str:
        """Plain letters up to a stop letter, which is left in place."""
        start = self._at
        while isinstance(letter := self.peek(), str) and letter and letter not in stops:
            self._at += 1
        return "".join(item for item in self._items[start : self._at] if isinstance(item, str))

    def skip_space(self) -> None:
        while isinstance(letter := self.peek(), str) and letter.isspace():
            self._at += 1

    def mapping(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in self._members("}"):
            key = self._key()
            if key in values:
                raise MalformedArguments(f"the key {key!r} is given twice")
            values[key] = self.value(depth + 1, f"the key {key!r}")
        return values

    def sequence(self, depth: int) -> list[Any]:
        return [self.value(depth + 1, "a list") for _ in self._members("]")]

    def value(self, depth: int, of: str) -> Any:
        if depth > MAX_DEPTH:
            raise MalformedArguments(f"values are nested more than {MAX_DEPTH} levels deep")
        self.skip_space()
        item = self.peek()
        if isinstance(item, Text):
            self._at += 1
            return item.text
        if item == "{":
            return self.mapping(depth)
        if item == "[":
            return self.sequence(depth)
        word = self.until(",}]").strip()
        if not word:
            raise MalformedArguments(f"{of} has no value")
        return _bare(word)

    def _key(self) -> str:
        item = self.peek()
        if isinstance(item, Text):  # declarations quote the keys of nested values, so models may
            self._at += 1
            key = item.text
            self.skip_space()
        else:
            key = self.until(":,}").strip()
        if self.peek() != ":":
            raise MalformedArguments(f"there is no colon after the key {key!r}")
        self._at += 1
        return key

    def _members(self, closing: str) -> Iterator[None]:
        """Stop once before each member, checking the commas between; then step over the end."""
        self._at += 1  # the opening brace
        self.skip_space()
        while self.peek() != closing:
            yield
            self.skip_space()
            if not self.peek():
                raise MalformedArguments(f"there is no closing {closing}")
            if self.peek() == ",":
                self._at += 1
                self.skip_space()
            elif self.peek() != closing:
                raise MalformedArguments(f"expected a comma or {closing}, found {self.rest()[:40]!r}")
        self._at += 1


def _bare(word: str) -> Any:
    if word in _WORDS:
        return _WORDS[word]
    if _INTEGER.fullmatch(word):
        return int(word)
    if _FLOAT.fullmatch(word) and math.isfinite(number := float(word)):
        return number
    return word
