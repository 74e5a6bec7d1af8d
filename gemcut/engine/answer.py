"""One answer while it is written: ids become text, reasoning and tool calls, and stop strings end it.

Enters: sampled ids, one at a time. Leaves: `Delta`s, and at the end a `CompletionOutput`. Integers and
text only.
"""

from __future__ import annotations

from collections.abc import Sequence

from gemcut.data import Control, Text, TokenLogprobs
from gemcut.outputs import CompletionOutput, Delta, FinishReason, ToolCall
from gemcut.prompt.replies import (
    CallFinished,
    CallMalformed,
    CallStarted,
    Event,
    ReasoningDelta,
    ReplyParser,
    TextDelta,
)
from gemcut.prompt.tokenizer import Tokenizer


class StopStrings:
    """Finds the first of several strings in a stream of text; holds back what may be its beginning."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may go out, and whether a stop string was found; it is cut off with what follows."""
        if not self._stops:
            return text, False
        text = self._held + text
        self._held = ""
        # the earliest end: the answer stops as soon as any stop string is complete
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)[1]], True
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                self._held = text[-size:]
                return text[:-size], False
        return text, False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


class Answer:
    """Everything about one answer, collected.

    chat: the ids are a reply in Gemma 4's format; otherwise plain text, control tokens left out.
    in_thought: the prompt ends inside an open thought. A stop string is looked for in the text, not in
    reasoning or calls.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        *,
        chat: bool,
        in_thought: bool = False,
        stop: Sequence[str] = (),
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._detokenizer = tokenizer.detokenizer()
        self._parser = ReplyParser(starts_in_thought=in_thought) if chat else None
        self._stops = StopStrings(stop)
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []
        self._malformed: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._error: str | None = None

    def push(self, token_id: int, logprobs: TokenLogprobs | None = None) -> tuple[Delta, bool]:
        """Take a sampled id. Returns its news, and whether a stop string is complete."""
        self.token_ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        events = self._read(self._detokenizer.push(token_id))
        return self._delta(events, (token_id,), () if logprobs is None else (logprobs,))

    def finish(self, reason: FinishReason, error: str | None = None) -> Delta:
        """End the answer: what was held back comes out, unless a stop string was found."""
        events: list[Event] = []
        if self.finish_reason is None:
            events = self._read(self._detokenizer.flush())
            if self._parser is not None:
                events += self._parser.finish()
        delta, stopped = self._delta(events, (), ())
        text = delta.text if self.finish_reason or stopped else delta.text + self._flush_stops()
        if self.finish_reason == "stop" and reason == "length":
            reason = "stop"  # the last token that may come completed a stop string
        if self._calls and reason == "stop":
            reason = "tool_calls"
        self.finish_reason, self._error = reason, error
        return Delta(
            index=self.index,
            text=text,
            reasoning=delta.reasoning,
            call_started=delta.call_started,
            tool_calls=delta.tool_calls,
            finish_reason=reason,
        )

    def give_up(self, error: str) -> Delta:
        """End the answer as it is: what was held back stays unread."""
        self.finish_reason, self._error = "error", error
        return Delta(index=self.index, finish_reason="error")

    def output(self) -> CompletionOutput:
        """The answer so far, or whole."""
        return CompletionOutput(
            index=self.index,
            text="".join(self._text),
            reasoning="".join(self._reasoning),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason or "abort",
            tool_calls=tuple(self._calls),
            malformed_calls=tuple(self._malformed),
            logprobs=tuple(self._logprobs) if self._logprobs else None,
            error=self._error,
        )

    def _flush_stops(self) -> str:
        held = self._stops.flush()
        self._text.append(held)
        return held

    def _read(self, pieces: Sequence[Text | Control]) -> list[Event]:
        if self._parser is None:
            return [TextDelta(piece.text) for piece in pieces if isinstance(piece, Text)]
        return [event for piece in pieces for event in self._parser.push(piece)]

    def _delta(
        self, events: Sequence[Event], token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]
    ) -> tuple[Delta, bool]:
        text, reasoning, started, calls, stopped = "", "", [], [], False
        for event in events:
            if isinstance(event, TextDelta):
                out, stopped = self._stops.push(event.text)
                text += out
                if stopped:
                    break
            elif isinstance(event, ReasoningDelta):
                reasoning += event.text
            elif isinstance(event, CallStarted):
                started.append(event.name)
            elif isinstance(event, CallFinished):
                calls.append(ToolCall(event.name, event.arguments))
            elif isinstance(event, CallMalformed):
                self._malformed.append(event.raw)
        self._text.append(text)
        self._reasoning.append(reasoning)
        self._calls += calls
        delta = Delta(
            index=self.index,
            text=text,
            reasoning=reasoning,
            token_ids=token_ids,
            call_started=tuple(started),
            tool_calls=tuple(calls),
            logprobs=logprobs,
        )
        if stopped:
            self.finish_reason = "stop"
        return delta, stopped
