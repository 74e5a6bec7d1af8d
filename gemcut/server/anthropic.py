"""Anthropic's `/v1/messages`: bodies become conversations, outputs become its content blocks and events."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gemcut.engine.loop import Job
from gemcut.engine.model_files import ChatPrompt, ModelFiles
from gemcut.errors import InvalidRequest
from gemcut.outputs import CompletionOutput, Delta, RequestOutput, ToolCall
from gemcut.sampling import SamplingParams, StructuredOutputs
from gemcut.server.answerer import Answerer, Conversation, check_complete
from gemcut.server.exchange import encode
from gemcut.server.protocol import MAX_MESSAGES, MAX_TOOLS, Strict, check_stops
from gemcut.server.stream import named_event
from gemcut.server.tool_choice import ToolChoice, form_of

_PING = named_event("ping", {"type": "ping"})
ERROR = {"type": "text", "text": "Error: "}


class CacheControl(Strict):
    """Accepted: prefixes are cached without being asked."""

    type: Literal["ephemeral"]


class TextBlock(Strict, tag_field="type", tag="text"):
    text: str
    cache_control: CacheControl | None = None
    citations: None = None


class Base64Source(Strict, tag_field="type", tag="base64"):
    data: str
    media_type: Literal["image/png", "image/jpeg", "image/webp", "image/gif"]


class UrlSource(Strict, tag_field="type", tag="url"):
    url: str


class ImageBlock(Strict, tag_field="type", tag="image"):
    source: Base64Source | UrlSource
    cache_control: CacheControl | None = None


class ToolUseBlock(Strict, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResultBlock(Strict, tag_field="type", tag="tool_result"):
    """is_error: the model has no sign for it, so the content begins with the word."""

    tool_use_id: str
    content: str | list[TextBlock | ImageBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class ThinkingBlock(Strict, tag_field="type", tag="thinking"):
    thinking: str
    signature: str | None = None


class Message(Strict):
    role: Literal["user", "assistant"]
    content: str | list[TextBlock | ImageBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock]


class ToolSpec(Strict):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None


class AutoChoice(Strict, tag_field="type", tag="auto"):
    disable_parallel_tool_use: bool | None = None


class AnyChoice(Strict, tag_field="type", tag="any"):
    disable_parallel_tool_use: bool | None = None


class ToolNamed(Strict, tag_field="type", tag="tool"):
    name: str
    disable_parallel_tool_use: bool | None = None


class NoChoice(Strict, tag_field="type", tag="none"):
    pass


class ThinkingOn(Strict, tag_field="type", tag="enabled"):
    """budget_tokens: a thought that goes on for so long is closed."""

    budget_tokens: int


class ThinkingAdaptive(Strict, tag_field="type", tag="adaptive"):
    pass


class ThinkingOff(Strict, tag_field="type", tag="disabled"):
    pass


class Metadata(Strict):
    user_id: str | None = None


class JsonFormat(Strict, tag_field="type", tag="json_schema"):
    schema: dict[str, Any]


class OutputConfig(Strict):
    format: JsonFormat | None = None


class CountRequest(Strict, kw_only=True):
    """What `count_tokens` takes: all that makes the prompt."""

    model: str
    messages: list[Message]
    system: str | list[TextBlock] | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: AutoChoice | AnyChoice | ToolNamed | NoChoice | None = None
    thinking: ThinkingOn | ThinkingAdaptive | ThinkingOff | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None


class MessagesRequest(CountRequest, kw_only=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


async def prompt_of(answerer: Answerer, request: CountRequest) -> ChatPrompt:
    """The rendered conversation. Raises InvalidRequest with messages counted as the client counts them."""
    if not 1 <= len(request.messages) <= MAX_MESSAGES:
        raise InvalidRequest(f"messages must hold 1 to {MAX_MESSAGES} messages.", "messages")
    if len(request.tools or ()) > MAX_TOOLS:
        raise InvalidRequest(f"tools holds more than {MAX_TOOLS} tools.", "tools")
    messages, places = _conversation(request)
    return await answerer.chat_prompt(
        Conversation(
            messages=messages,
            tools=[] if tool_choice(request).hidden else [_tool(tool) for tool in request.tools or ()],
            enable_thinking=isinstance(request.thinking, ThinkingOn | ThinkingAdaptive),
            places=places,
        )
    )


async def messages_job(answerer: Answerer, request: MessagesRequest, salt: bytes) -> Job:
    """The job of a message. Raises InvalidRequest."""
    check_stops(request.stop_sequences or (), "stop_sequences")
    choice = tool_choice(request)
    output = None if request.output_config is None else request.output_config.format
    asked = None if output is None else StructuredOutputs(json_schema=output.schema)
    tools = [_tool(tool) for tool in request.tools or ()]
    strict = [tool.name for tool in request.tools or () if tool.strict]
    form = await form_of(answerer, choice, tools, asked, strict=strict, schemas="input_schema")
    params = SamplingParams(
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        stop=tuple(request.stop_sequences or ()),
        stop_token_ids=choice.stop_ids(answerer.files),
        max_thought_tokens=_thought_budget(request),
        structured_outputs=form,
    )
    return answerer.job(await prompt_of(answerer, request), params, chat=True, salt=salt)


def _thought_budget(request: MessagesRequest) -> int | None:
    if not isinstance(request.thinking, ThinkingOn):
        return None
    budget = request.thinking.budget_tokens
    if not 1 <= budget < request.max_tokens:
        raise InvalidRequest(
            f"thinking.budget_tokens must be at least 1 and less than max_tokens {request.max_tokens}, "
            f"got {budget}.",
            "thinking.budget_tokens",
        )
    return budget


def tool_choice(request: CountRequest) -> ToolChoice:
    """What a request says of calls."""
    choice = request.tool_choice
    if choice is None or isinstance(choice, NoChoice):
        return ToolChoice(hidden=choice is not None)
    return ToolChoice(
        forced=not isinstance(choice, AutoChoice),
        only=(choice.name,) if isinstance(choice, ToolNamed) else None,
        single=bool(choice.disable_parallel_tool_use),
    )


def _conversation(request: CountRequest) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages as the template reads them, and for each its place in the request."""
    messages: list[dict[str, Any]] = []
    places: list[str] = []
    if request.system is not None:
        content = request.system if isinstance(request.system, str) else _parts(request.system)
        messages.append({"role": "system", "content": content})
        places.append("system")
    for number, message in enumerate(request.messages):
        made = [_assistant(message)] if message.role == "assistant" else _user(message)
        messages += made
        places += [f"messages[{number}]"] * len(made)
    return messages, places


def _user(message: Message) -> list[dict[str, Any]]:
    """Results of tools become messages of their own, before what the user says."""
    if isinstance(message.content, str):
        return [{"role": "user", "content": message.content}]
    results, rest = [], []
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            content = _parts(block.content) if isinstance(block.content, list) else block.content or ""
            if block.is_error:
                content = f"Error: {content}" if isinstance(content, str) else [ERROR, *content]
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        elif isinstance(block, TextBlock | ImageBlock):
            rest.append(block)
        else:
            raise InvalidRequest("A user's message holds text, images and tool results only.", "messages")
    return results + ([{"role": "user", "content": _parts(rest)}] if rest or not results else [])


def _assistant(message: Message) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": "assistant", "content": message.content}
    made: dict[str, Any] = {"role": "assistant"}
    spoken: list[TextBlock | ImageBlock] = []
    for block in message.content:
        if isinstance(block, ThinkingBlock):
            made["reasoning"] = made.get("reasoning", "") + block.thinking
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": block.input}
            made.setdefault("tool_calls", []).append(
                {"id": block.id, "type": "function", "function": function}
            )
        elif isinstance(block, TextBlock):
            spoken.append(block)
        else:
            raise InvalidRequest("An assistant's message holds text, thinking and tool use only.", "messages")
    if spoken:
        made["content"] = _parts(spoken)
    return made


def _parts(blocks: Sequence[TextBlock | ImageBlock]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for block in blocks:
        if isinstance(block, TextBlock):
            parts.append({"type": "text", "text": block.text})
            continue
        source = block.source
        url = (
            source.url if isinstance(source, UrlSource) else f"data:{source.media_type};base64,{source.data}"
        )
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def _tool(tool: ToolSpec) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


class MessageWriter:
    """Writes the answer to one message, whole or as events."""

    def __init__(self, answerer: Answerer, request: MessagesRequest, job: Job) -> None:
        self._files, self._job, self._model = answerer.files, job, request.model
        self._id = f"msg_{secrets.token_hex(12)}"
        self._is_started = False
        self._index = -1  # of the open content block
        self._kind: str | None = None  # and what it holds

    def whole(self, output: RequestOutput) -> bytes:
        """The body of an answer that is not streamed."""
        (answer,) = output.outputs
        content: list[dict[str, Any]] = []
        if answer.reasoning:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
        text = answer.text + "".join(answer.malformed_calls)
        if text:
            content.append({"type": "text", "text": text})
        content += [_tool_use(call) for call in answer.tool_calls]
        return encode(self._message(content, usage_of(output)) | stop_of(self._files, self._job, answer))

    def events(self, deltas: Sequence[Delta], output: RequestOutput | None) -> bytes:
        """The events of an answer that is: of its latest news, the output with the last. Nothing for tokens
        without text. Raises what cut the answer off."""
        if output is not None:
            check_complete(output)
        elif not deltas and self._is_started:
            return _PING
        pieces = [] if self._is_started else [self._start()]
        self._is_started = True
        for delta in deltas:
            pieces += self._news(delta)
        if output is not None:
            pieces += self._end(output)
        return b"".join(pieces)

    def _start(self) -> bytes:
        usage = {"input_tokens": len(self._job.prompt.prompt), "output_tokens": 0}
        message = self._message([], usage) | {"stop_reason": None, "stop_sequence": None}
        return named_event("message_start", {"type": "message_start", "message": message})

    def _news(self, delta: Delta) -> list[bytes]:
        pieces: list[bytes] = []
        if delta.reasoning:
            block = {"type": "thinking", "thinking": "", "signature": ""}
            pieces += self._open(block)
            pieces.append(self._delta({"type": "thinking_delta", "thinking": delta.reasoning}))
        if delta.text:
            pieces += self._open({"type": "text", "text": ""})
            pieces.append(self._delta({"type": "text_delta", "text": delta.text}))
        for call in delta.tool_calls:
            block = _tool_use(call)
            pieces += self._close()
            pieces += self._open(block | {"input": {}})
            arguments = encode(call.arguments).decode()
            pieces.append(self._delta({"type": "input_json_delta", "partial_json": arguments}))
            pieces += self._close()
        return pieces

    def _end(self, output: RequestOutput) -> list[bytes]:
        (answer,) = output.outputs
        pieces: list[bytes] = []
        if answer.malformed_calls:
            pieces += self._open({"type": "text", "text": ""})
            pieces.append(self._delta({"type": "text_delta", "text": "".join(answer.malformed_calls)}))
        pieces += self._close()
        delta = stop_of(self._files, self._job, answer)
        last = {"type": "message_delta", "delta": delta, "usage": usage_of(output)}
        return [
            *pieces,
            named_event("message_delta", last),
            named_event("message_stop", {"type": "message_stop"}),
        ]

    def _open(self, block: Mapping[str, Any]) -> list[bytes]:
        """Begin a block, unless one of its kind is open."""
        if self._kind == block["type"]:
            return []
        pieces = self._close()
        self._index += 1
        self._kind = block["type"]
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return [*pieces, named_event("content_block_start", start)]

    def _close(self) -> list[bytes]:
        if self._kind is None:
            return []
        self._kind = None
        return [named_event("content_block_stop", {"type": "content_block_stop", "index": self._index})]

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        payload = {"type": "content_block_delta", "index": self._index, "delta": delta}
        return named_event("content_block_delta", payload)

    def _message(self, content: Sequence[Any], usage: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "usage": usage,
        }


def usage_of(output: RequestOutput) -> dict[str, int]:
    """Anthropic counts cached tokens apart from the others."""
    usage = output.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


def stop_of(files: ModelFiles, job: Job, answer: CompletionOutput) -> dict[str, Any]:
    """Why the answer ended, in Anthropic's words."""
    if answer.finish_reason == "tool_calls":
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if answer.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if job.params.stop and answer.token_ids and answer.token_ids[-1] not in files.defaults.eos:
        # the earliest that is complete ended it, as in `engine.answer.StopStrings`
        said = files.tokenizer.decode(answer.token_ids).rpartition("<channel|>")[2]
        found = [(at + len(stop), stop) for stop in job.params.stop if (at := said.find(stop)) >= 0]
        if found:
            return {"stop_reason": "stop_sequence", "stop_sequence": min(found)[1]}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _tool_use(call: ToolCall) -> dict[str, Any]:
    return {
        "type": "tool_use",
        "id": f"toolu_{secrets.token_hex(12)}",
        "name": call.name,
        "input": call.arguments,
    }
