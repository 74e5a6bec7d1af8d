"""What a reply means: text, reasoning and tool calls (spec 6.4).

Enters: `Text` and `Control` pieces from the detokenizer. Leaves: events while the model writes, or one
`Reply`. Markers are control tokens, never letters, so no text has to be held back to look for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gemcut.data import Control, Text
from gemcut.prompt.calls import MalformedArguments, call_name, parse_call

_LABEL = "thought\n"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the thought."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """The name of a call is known. Its end follows as `CallFinished` or `CallMalformed`."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallFinished:
    """A call is complete. `index` counts all calls of the reply, malformed ones too."""

    index: int
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CallMalformed:
    """A call that cannot be read: its spelling as the model wrote it, and what is wrong with it.

    `name` is None if there is no name, and then no `CallStarted` came before.
    """

    index: int
    name: str | None
    raw: str
    reason: str


Event = TextDelta | ReasoningDelta | CallStarted | CallFinished | CallMalformed


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[CallFinished, ...] = ()
    malformed_calls: tuple[CallMalformed, ...] = ()


@dataclass(slots=True)
class _Call:
    index: int
    pieces: list[Text | Control] = field(default_factory=list)
    head: str = ""  # text before the first brace, while there is none
    name: str | None = None
    head_done: bool = False


class ReplyParser:
    """Streaming parser of one reply. Any split of the text gives the same reply.

    starts_in_thought: the prompt ends inside an open thought (thinking on, after a tool response), see
        `template.starts_in_thought`.
    """

    def __init__(self, *, starts_in_thought: bool = False) -> None:
        self._thinking = starts_in_thought
        self._label: str | None = None  # the start of a thought, until it is or is not the label
        self._newline = False  # a newline at the end of the thought so far, held back
        self._call: _Call | None = None
        self._calls = 0

    def push(self, piece: Text | Control) -> list[Event]:
        """The events of one piece."""
        if isinstance(piece, Text):
            return self._text(piece.text) if piece.text else []
        token = piece.token
        # the end of the turn also ends whatever is open: a call without its closing token is still
        # reported, complete or malformed
        if token in ("<turn|>", "<eos>", "<|tool_response>", "<|tool_call>"):
            events = self.finish()
            if token == "<|tool_call>":
                self._call = _Call(self._calls)
                self._calls += 1
            return events
        if self._call is not None:
            if token == "<tool_call|>":
                return self._end_call()
            self._call.pieces.append(piece)
            if not self._call.head_done:  # a name has no control tokens
                self._call.head_done = True
            return []
        if token == "<|channel>":
            events = self._end_label(closed=True) if self._thinking else []
            self._thinking, self._label = True, ""
            return events
        if token == "<channel|>" and self._thinking:
            return self._end_thought(closed=True)
        return []  # control tokens are not text: a stray quote or closing marker is dropped

    def finish(self) -> list[Event]:
        """The events that only the end of the reply makes certain. An open thought stays reasoning."""
        if self._call is not None:
            return self._end_call()
        return self._end_thought(closed=False) if self._thinking else []

    def _text(self, text: str) -> list[Event]:
        if self._call is not None:
            self._call.pieces.append(Text(text))
            return self._read_head(self._call, text)
        if not self._thinking:
            return [TextDelta(text)]
        if self._label is not None:
            self._label += text
            if self._label != _LABEL and _LABEL.startswith(self._label):
                return []
            text, self._label = self._label.removeprefix(_LABEL), None
        return self._reason(text)

    def _reason(self, text: str) -> list[Event]:
        """Reasoning, less a newline at its end: the template writes one before `<channel|>`."""
        if not text:
            return []
        if self._newline:
            text = f"\n{text}"
        self._newline = text.endswith("\n")
        text = text[:-1] if self._newline else text
        return [ReasoningDelta(text)] if text else []

    def _end_label(self, closed: bool) -> list[Event]:
        """A thought that ended before its label did. The label, or a cut-off one, is no reasoning."""
        label, self._label = self._label or "", None
        return self._reason(label) if closed and label != _LABEL.rstrip() else []

    def _end_thought(self, closed: bool) -> list[Event]:
        events = self._end_label(closed)
        if self._newline and not closed:
            events.append(ReasoningDelta("\n"))
        self._thinking = self._newline = False
        return events

    def _read_head(self, call: _Call, text: str) -> list[Event]:
        """Give the name once the brace after it is there."""
        if call.head_done:
            return []
        call.head += text
        if "{" not in text:
            return []
        call.head_done = True
        try:
            call.name = call_name(call.head)
        except MalformedArguments:
            return []  # the end of the call reports it, with all that the model wrote
        return [CallStarted(call.index, call.name)]

    def _end_call(self) -> list[Event]:
        call, self._call = self._call, None
        assert call is not None, "a call is open"
        try:
            name, arguments = parse_call(call.pieces)
        except MalformedArguments as error:
            raw = "".join(p.text if isinstance(p, Text) else p.token for p in call.pieces)
            return [CallMalformed(call.index, call.name, raw, str(error))]
        return [CallFinished(call.index, name, arguments)]


def parse(pieces: Iterable[Text | Control], *, starts_in_thought: bool = False) -> Reply:
    """A whole reply at once."""
    parser = ReplyParser(starts_in_thought=starts_in_thought)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    return collect(events)


def collect(events: Iterable[Event]) -> Reply:
    """The reply that events add up to."""
    events = list(events)
    return Reply(
        "".join(event.text for event in events if isinstance(event, TextDelta)),
        "".join(event.text for event in events if isinstance(event, ReasoningDelta)),
        tuple(event for event in events if isinstance(event, CallFinished)),
        tuple(event for event in events if isinstance(event, CallMalformed)),
    )
