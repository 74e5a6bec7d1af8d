"""Gemma 4's chat template (official version of 2026-07-09, spec 6.3) as a renderer of segments.

Enters: messages and tools as plain mappings. Leaves: segments, with controls and media placed by
structure. It must not know token ids, and it never looks for control tokens in text, with the one
exception that the template itself makes: thoughts are cut out of model text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeGuard

from gemcut.data import Control, MediaKind, Segment
from gemcut.errors import InvalidRequest
from gemcut.prompt.tools import function_name, write_declaration, write_members, write_value
from gemcut.prompt.writer import MediaPart, SegmentWriter

Message = Mapping[str, Any]
# what a message ends in, as far as the generation prompt cares
Ending = Literal["text", "calls", "responses"]

TEMPLATE_MEDIA: dict[str, MediaKind] = {
    "image": "image",
    "image_url": "image",
    "audio": "audio",
    "input_audio": "audio",
    "video": "video",
}
# part types that clients send and the template drops; we give them their slot
OWN_MEDIA: dict[str, MediaKind] = {"input_image": "image", "video_url": "video"}


def render(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool = False,
    preserve_thinking: bool = False,
    add_generation_prompt: bool = True,
    empty_thought: bool,
    drop_unknown: bool = False,
) -> list[Segment]:
    """Render a conversation.

    empty_thought: whether a generation prompt without thinking carries `<|channel>thought\\n<channel|>`
        (12B, 26B-A4B, 31B: yes; E2B, E4B: no). See `variant.carries_empty_thought`.
    drop_unknown: the template drops content that it does not know. Here that is an `InvalidRequest`,
        since a question about a lost picture gets a wrong answer. True gives the template's own
        behaviour, for parity checks.

    Slots are numbered in the order in which they appear; `media_parts` lists the media in that order.
    """
    turns = _Turns(messages, drop_unknown)
    turns.out.control("<bos>")
    turns.system(enable_thinking, tools or ())
    ending = turns.conversation(preserve_thinking)
    if add_generation_prompt:
        _generation_prompt(turns.out, ending, enable_thinking, empty_thought)
    return turns.out.segments()


def media_parts(messages: Sequence[Message]) -> list[MediaPart]:
    """The media of a conversation in slot order: entry i belongs to `Slot(index=i)` of `render`."""
    turns = _Turns(messages, drop_unknown=False)
    turns.system(False, ())
    turns.conversation(preserve_thinking=False)
    return turns.out.media


def starts_in_thought(segments: Sequence[Segment]) -> bool:
    """Whether the model's reply continues a thought that the prompt opened (spec 6.4, 1)."""
    controls = [segment.token for segment in segments if isinstance(segment, Control)]
    return bool(controls) and controls[-1] == "<|channel>"


def strip_thoughts(text: str) -> str:
    """Model text without its `<|channel>...<channel|>` spans, trimmed.

    An opener without a closer takes the rest with it; a closer alone disappears.
    """
    return "".join(piece.split("<|channel>", 1)[0] for piece in text.split("<channel|>")).strip()


class _Turns:
    """One rendering in progress: the messages, what each is followed by, and the output."""

    def __init__(self, messages: Sequence[Message], drop_unknown: bool) -> None:
        for i, message in enumerate(messages):
            role = message.get("role") if isinstance(message, Mapping) else None
            if not isinstance(role, str) or not role:
                at = f"messages[{i}].role"
                raise InvalidRequest(f"{at} must be a non-empty string, got {role!r}.", at)
        self.out = SegmentWriter()
        self.messages = messages
        self.drop_unknown = drop_unknown
        # a system message at the start is part of the system turn; later ones are turns of their own
        self.start = int(bool(messages) and messages[0]["role"] in ("system", "developer"))

    def system(self, enable_thinking: bool, tools: Sequence[Mapping[str, Any]]) -> None:
        if not (enable_thinking or tools or self.start):
            return
        self.out.control("<|turn>")
        self.out.text("system\n")
        if enable_thinking:
            self.out.control("<|think|>")
            self.out.text("\n")
        if self.start:
            self._system_text(self.messages[0].get("content"))
        for i, tool in enumerate(tools):
            write_declaration(self.out, tool, f"tools[{i}]")
        self._end_turn()

    def conversation(self, preserve_thinking: bool) -> Ending:
        indices = range(self.start, len(self.messages))
        spoken = [i for i in indices if self.messages[i]["role"] != "tool"]
        last_user = max((i for i in spoken if self.messages[i]["role"] == "user"), default=-1)
        answers = {i: self._tool_messages_after(i) for i in spoken if self.messages[i].get("tool_calls")}
        self._check_orphans(set(indices) - set(spoken) - {k for ks in answers.values() for k in ks})
        ending: Ending = "text"
        for position, i in enumerate(spoken):
            message = self.messages[i]
            before = self.messages[spoken[position - 1]]["role"] if position else None
            after = self.messages[spoken[position + 1]]["role"] if position + 1 < len(spoken) else None
            if not (message["role"] == before == "assistant"):
                self.out.control("<|turn>")
                self.out.text(f"{_turn_name(message)}\n")
            if i > last_user or (preserve_thinking and message.get("tool_calls")):
                self._reasoning(message, i)
            called = self._calls(message, i)
            answered = self._responses(message, i, answers.get(i, ()))
            has_content = self._content(message, i)
            ending = "responses" if answered else "calls" if called else "text"
            if ending == "calls":
                self.out.control("<|tool_response>")  # also the stop token that ends a call
            elif message["role"] == after == "assistant" or (
                answered and not has_content and after is None  # the model goes on from here
            ):
                continue
            else:
                self._end_turn()
        return ending

    def _end_turn(self) -> None:
        self.out.control("<turn|>")
        self.out.text("\n")

    def _system_text(self, content: Any) -> None:
        at = "messages[0].content"
        if isinstance(content, str):
            self.out.text(content.strip())
        elif _is_part_list(content, at):
            for k, part in enumerate(content):
                part = _checked_part(part, f"{at}[{k}]")
                if part.get("type") not in (None, "text") and "text" not in part:
                    self._refuse(f"{at}[{k}]", f"a {part['type']!r} part in the first system message")
                self.out.text(_part_text(part, f"{at}[{k}]", missing="").strip() + " ")
        elif content is not None:
            self._refuse(at, f"content of type {type(content).__name__}")

    def _reasoning(self, message: Message, i: int) -> None:
        text = message.get("reasoning") or message.get("reasoning_content")
        if not text:
            return
        if not isinstance(text, str):
            at = f"messages[{i}].reasoning"
            raise InvalidRequest(f"{at} must be a string, got {type(text).__name__}.", at)
        self.out.control("<|channel>")
        self.out.text(f"thought\n{text}\n")
        self.out.control("<channel|>")

    def _calls(self, message: Message, i: int) -> bool:
        calls = message.get("tool_calls") or ()
        for k, call in enumerate(calls):
            at = f"messages[{i}].tool_calls[{k}].function"
            function = call.get("function") if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping):
                raise InvalidRequest(f"{at} must be an object with a name and arguments.", at)
            arguments = function.get("arguments", "missing")
            if arguments is not None and not isinstance(arguments, Mapping):
                got = "nothing" if arguments == "missing" else f"a {type(arguments).__name__}"
                raise InvalidRequest(
                    f"{at}.arguments must be a JSON object (mapping), got {got}. "
                    "Decode a JSON string before rendering.",
                    f"{at}.arguments",
                )
            self.out.control("<|tool_call>")
            self.out.text(f"call:{function_name(function, at)}{{")
            write_members(self.out, arguments or {}, f"{at}.arguments")
            self.out.text("}")
            self.out.control("<tool_call|>")
        return bool(calls)

    def _responses(self, message: Message, i: int, answers: Sequence[int]) -> bool:
        legacy = message.get("tool_responses") or ()
        if legacy:
            self._check_orphans(set(answers))
        for k, response in enumerate(legacy):
            at = f"messages[{i}].tool_responses[{k}]"
            if not isinstance(response, Mapping):
                raise InvalidRequest(f"{at} must be an object with a name and a response.", at)
            self._response(_name_or_unknown(response, at), response.get("response", []), at)
        for k in () if legacy else answers:
            answer = self.messages[k]
            at = f"messages[{k}]"
            # without ids on both sides every call matches, and the last one wins, as in the template
            names = [
                function_name(call["function"], at)
                for call in message["tool_calls"]
                if call.get("id") == answer.get("tool_call_id")
            ]
            name = names[-1] if names else _name_or_unknown(answer, at)
            self._answer(name, answer.get("content"), f"{at}.content")
        return bool(legacy or answers)

    def _answer(self, name: str, content: Any, at: str) -> None:
        """One tool message. Texts make up the value; media follow the block."""
        if isinstance(content, str) or not _is_part_list(content, at):
            self._response(name, content, at)
            return
        texts: list[str] = []
        media: list[MediaPart] = []
        for k, part in enumerate(content):
            part = _checked_part(part, f"{at}[{k}]")
            if part.get("type") == "text":
                texts.append(_part_text(part, f"{at}[{k}]"))
            elif medium := self._medium(part, f"{at}[{k}]"):
                media.append(medium)
        self._response(name, "".join(texts), at)
        for medium in media:
            self.out.slot(medium)

    def _response(self, name: str, value: Any, at: str) -> None:
        self.out.control("<|tool_response>")
        self.out.text(f"response:{name}{{")
        if isinstance(value, Mapping):
            write_members(self.out, value, at)
        else:
            self.out.text("value:")
            write_value(self.out, value, at)
        self.out.text("}")
        self.out.control("<tool_response|>")

    def _content(self, message: Message, i: int) -> bool:
        """Write the content of a turn. Whether there was any."""
        at = f"messages[{i}].content"
        by_model = _turn_name(message) == "model"
        content = message.get("content")
        if isinstance(content, str):
            return self._spoken(content, by_model)
        if not _is_part_list(content, at):
            if content is not None:
                self._refuse(at, f"content of type {type(content).__name__}")
            return False
        written = False
        for k, part in enumerate(content):
            part = _checked_part(part, f"{at}[{k}]")
            if part.get("type") == "text":
                text = _part_text(part, f"{at}[{k}]", missing=None if by_model else "")
                written |= self._spoken(text, by_model)
            elif medium := self._medium(part, f"{at}[{k}]"):
                self.out.slot(medium)
                written = True
        return written

    def _spoken(self, text: str, by_model: bool) -> bool:
        text = strip_thoughts(text) if by_model else text.strip()
        self.out.text(text)
        return bool(text)

    def _medium(self, part: Mapping[str, Any], at: str) -> MediaPart | None:
        known = TEMPLATE_MEDIA if self.drop_unknown else TEMPLATE_MEDIA | OWN_MEDIA
        kind = part.get("type")
        if isinstance(kind, str) and kind in known:
            return MediaPart(known[kind], part, at)
        self._refuse(at, f"a part of type {kind!r}" if "type" in part else "a part without a type")
        return None

    def _refuse(self, at: str, what: str) -> None:
        """Content that the template would drop."""
        if not self.drop_unknown:
            known = ", ".join(["text", *TEMPLATE_MEDIA, *OWN_MEDIA])
            raise InvalidRequest(
                f"{at} holds {what}, which cannot be rendered. "
                f"Content is a string or a list of parts: {known}.",
                at,
            )

    def _tool_messages_after(self, i: int) -> list[int]:
        stop = i + 1
        while stop < len(self.messages) and self.messages[stop]["role"] == "tool":
            stop += 1
        return list(range(i + 1, stop))

    def _check_orphans(self, indices: set[int]) -> None:
        """The template drops tool messages that follow no call. Their text may go, their media not."""
        for i in sorted(indices):
            content = self.messages[i].get("content")
            for k, part in enumerate(content if isinstance(content, list | tuple) else ()):
                if isinstance(part, Mapping) and part.get("type") != "text":
                    self._refuse(
                        f"messages[{i}].content[{k}]",
                        f"a {part.get('type')!r} part of a tool message without a call",
                    )


def _generation_prompt(out: SegmentWriter, ending: Ending, thinking: bool, empty_thought: bool) -> None:
    if ending == "text":
        out.control("<|turn>")
        out.text("model\n")
        if empty_thought and not thinking:
            out.control("<|channel>")
            out.text("thought\n")
            out.control("<channel|>")
    elif ending == "responses" and thinking:
        out.control("<|channel>")
        out.text("thought\n")


def _turn_name(message: Message) -> str:
    return "model" if message["role"] == "assistant" else message["role"]


def _name_or_unknown(holder: Mapping[str, Any], at: str) -> str:
    name = holder.get("name") or "unknown"
    if not isinstance(name, str):
        raise InvalidRequest(f"{at}.name must be a string, got {type(name).__name__}.", f"{at}.name")
    return name


def _is_part_list(content: Any, at: str) -> TypeGuard[Sequence[Any]]:
    if isinstance(content, Mapping):
        raise InvalidRequest(f"{at} is an object. Send a string, or a list of parts.", at)
    return isinstance(content, list | tuple)


def _checked_part(part: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(part, Mapping):
        raise InvalidRequest(
            f"{at} is a {type(part).__name__}. A part is an object such as "
            '{"type": "text", "text": "..."}.',
            at,
        )
    return part


def _part_text(part: Mapping[str, Any], at: str, missing: str | None = None) -> str:
    text = part.get("text", missing)
    if not isinstance(text, str):
        raise InvalidRequest(f"{at}.text must be a string, got {type(text).__name__}.", f"{at}.text")
    return text
