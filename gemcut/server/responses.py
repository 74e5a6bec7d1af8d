"""OpenAI's `/v1/responses`: its items become a conversation.

Nothing is stored: each request brings the whole of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from gemcut.engine.loop import Job
from gemcut.errors import InvalidRequest
from gemcut.sampling import SamplingParams, StructuredOutputs
from gemcut.server.answerer import Answerer, Conversation
from gemcut.server.errors import schema_error
from gemcut.server.protocol import (
    MAX_MESSAGES,
    MAX_TOOLS,
    JsonObjectFormat,
    ProcessorOptions,
    Strict,
    StructuredForm,
    TextFormat,
    arguments_of,
    check_priority,
    check_stops,
    thinks,
)
from gemcut.server.tool_choice import ToolChoice, form_of

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


# ---- what goes in


class InputText(Strict, tag_field="type", tag="input_text"):
    text: str


class InputImage(Strict, tag_field="type", tag="input_image"):
    image_url: str
    detail: Literal["auto", "low", "high"] | None = None
    file_id: None = None


class OutputText(Strict, tag_field="type", tag="output_text"):
    """Also what a server answered with, sent back: fields that gemcut never fills may be null or empty."""

    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


Content = str | list[InputText | InputImage | OutputText]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class Message(Strict, tag_field="type", tag="message"):
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: ItemStatus | None = None
    phase: None = None


class FunctionCall(Strict, tag_field="type", tag="function_call"):
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: ItemStatus | None = None


class FunctionCallOutput(Strict, tag_field="type", tag="function_call_output"):
    call_id: str
    output: str | list[InputText | InputImage]
    id: str | None = None
    status: ItemStatus | None = None


class SummaryText(Strict, tag_field="type", tag="summary_text"):
    text: str


class ReasoningText(Strict, tag_field="type", tag="reasoning_text"):
    text: str


class Reasoning(Strict, tag_field="type", tag="reasoning"):
    """A thought of an earlier answer. It belongs to the message or call that follows it."""

    summary: list[SummaryText]
    content: list[ReasoningText] | None = None
    id: str | None = None
    status: ItemStatus | None = None
    encrypted_content: None = None


Item = Message | FunctionCall | FunctionCallOutput | Reasoning


# ---- what is asked for


class FunctionTool(Strict, tag_field="type", tag="function"):
    """strict: the arguments of calls fit the schema. Without it they do only if a call is forced."""

    name: str
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ChosenFunction(Strict, tag_field="type", tag="function"):
    name: str


class AllowedFunctions(Strict, tag_field="type", tag="allowed_tools"):
    mode: Literal["auto", "required"]
    tools: list[ChosenFunction]


class SchemaFormat(Strict, tag_field="type", tag="json_schema"):
    """strict: the schema is held to in any case."""

    name: str
    schema: dict[str, Any]
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | JsonObjectFormat | SchemaFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Strict):
    effort: Effort | None = None
    summary: None = None
    generate_summary: None = None


class StreamOptions(Strict):
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Strict):
    """`input` is read item by item, since a message need not say that it is one."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    text: TextOptions | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | AllowedFunctions | None = None
    tools: list[FunctionTool] | None = None
    top_p: float | None = None
    truncation: Literal["disabled"] | None = None
    # nothing is kept between requests
    store: bool | None = None
    previous_response_id: str | None = None
    background: Literal[False] | None = None
    # about the request, not about the answer
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    # gemcut's own, as in chat completions
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    thinking_token_budget: int | None = None
    structured_outputs: StructuredForm | None = None
    mm_processor_kwargs: ProcessorOptions | None = None
    cache_salt: str | None = None
    priority: int | None = None


async def responses_job(answerer: Answerer, request: ResponsesRequest, salt: bytes) -> Job:
    """The job of a response. Raises InvalidRequest."""
    if request.store:
        raise InvalidRequest("No response is stored here. Send store: false.", "store")
    if request.previous_response_id is not None:
        raise InvalidRequest(
            "No response is stored here, so none can be gone on from. Send the whole conversation as input.",
            "previous_response_id",
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options goes with stream: true.", "stream_options")
    if len(request.tools or ()) > MAX_TOOLS:
        raise InvalidRequest(f"tools holds more than {MAX_TOOLS} functions.", "tools")
    choice = tool_choice(request)
    tools = [_tool(tool) for tool in request.tools or ()]
    strict = [tool.name for tool in request.tools or () if tool.strict]
    form = await form_of(answerer, choice, tools, _asked(request), strict=strict, schemas="parameters")
    params = _sampling(request, form, choice.stop_ids(answerer.files))
    priority = check_priority(request.priority)
    messages, places = await answerer.in_thread(lambda: _conversation(request))
    processor = request.mm_processor_kwargs
    prompt = await answerer.chat_prompt(
        Conversation(
            messages=messages,
            tools=() if choice.hidden else tools,
            enable_thinking=_thinks(request),
            image_tokens=None if processor is None else processor.max_soft_tokens,
            places=places,
        )
    )
    return answerer.job(prompt, params, chat=True, priority=priority, salt=salt)


def tool_choice(request: ResponsesRequest) -> ToolChoice:
    """What a request says of calls."""
    choice, single = request.tool_choice, request.parallel_tool_calls is False
    if isinstance(choice, ChosenFunction):
        return ToolChoice(forced=True, only=(choice.name,), single=single)
    if isinstance(choice, AllowedFunctions):
        names = tuple(tool.name for tool in choice.tools)
        return ToolChoice(forced=choice.mode == "required", only=names, single=single)
    return ToolChoice(hidden=choice == "none", forced=choice == "required", single=single)


def _tool(tool: FunctionTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.parameters is not None:
        function["parameters"] = tool.parameters
    return {"type": "function", "function": function}


def _asked(request: ResponsesRequest) -> StructuredOutputs | None:
    """The form of the answer, from text.format or structured_outputs."""
    wanted, own = None if request.text is None else request.text.format, request.structured_outputs
    if wanted is None or isinstance(wanted, TextFormat):
        return None if own is None else StructuredOutputs(**msgspec.structs.asdict(own))
    if own is not None:
        raise InvalidRequest(
            "text.format and structured_outputs are both given; send one of them.", "structured_outputs"
        )
    if isinstance(wanted, JsonObjectFormat):
        return StructuredOutputs(json_object=True)
    return StructuredOutputs(json_schema=wanted.schema)


def _sampling(
    request: ResponsesRequest, form: StructuredOutputs | None, stop_ids: Sequence[int]
) -> SamplingParams:
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    check_stops(stop, "stop")
    given = {
        name: value
        for name in ("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        if (value := getattr(request, name)) is not None
    }
    budget = request.thinking_token_budget
    if budget is not None and not _thinks(request):
        raise InvalidRequest(
            "thinking_token_budget goes with thinking: send reasoning.effort.", "thinking_token_budget"
        )
    try:
        return SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            max_tokens=request.max_output_tokens,
            seed=request.seed,
            stop=tuple(stop),
            stop_token_ids=tuple(stop_ids),
            max_thought_tokens=budget,
            structured_outputs=form,
            **given,
        )
    except InvalidRequest as error:
        names = {"max_tokens": "max_output_tokens", "max_thought_tokens": "thinking_token_budget"}
        if error.param in names:
            name = names[error.param]
            raise InvalidRequest(str(error).replace(error.param, name), name) from error
        raise


def _thinks(request: ResponsesRequest) -> bool:
    return thinks(None if request.reasoning is None else request.reasoning.effort, None)


# ---- items to messages


def _conversation(request: ResponsesRequest) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages as the template reads them, and for each its place in the request."""
    messages: list[dict[str, Any]] = []
    places: list[str] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
        places.append("instructions")
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}], [*places, "input"]
    if not 1 <= len(request.input) <= MAX_MESSAGES:
        raise InvalidRequest(f"input must hold 1 to {MAX_MESSAGES} items, not {len(request.input)}.", "input")
    thought: list[str] = []  # for the message or call that comes next
    answerable: set[str] = set()  # calls that the next item may be an output of
    for i, raw in enumerate(request.input):
        at = f"input[{i}]"
        item = _item(raw, at)
        is_call = isinstance(item, FunctionCall)
        if isinstance(item, FunctionCallOutput):
            if item.call_id not in answerable:
                raise InvalidRequest(
                    f"{at} answers no call before it. Only calls and outputs may stand between the two.",
                    f"{at}.call_id",
                )
            answerable.remove(item.call_id)
        elif not is_call:
            answerable.clear()
        if isinstance(item, Reasoning):
            thought += [part.text for part in item.content or item.summary]
            continue
        if thought and not is_call and not (isinstance(item, Message) and item.role == "assistant"):
            raise InvalidRequest(
                f"{at} follows a reasoning item, which belongs before the message or call that it led to.", at
            )
        if is_call:
            answerable.add(item.call_id)
            function = {"name": item.name, "arguments": arguments_of(item.arguments, f"{at}.arguments")}
            call = {"id": item.call_id, "type": "function", "function": function}
            if not thought and messages and "tool_calls" in messages[-1]:
                messages[-1]["tool_calls"].append(call)
                continue
            made: dict[str, Any] = {"role": "assistant", "tool_calls": [call]}
        elif isinstance(item, FunctionCallOutput):
            made = {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)}
        else:
            made = {"role": item.role, "content": _content(item.content)}
        if thought:
            made["reasoning"] = "".join(thought)
            thought = []
        messages.append(made)
        places.append(at)
    if thought:
        raise InvalidRequest(
            "input ends in a reasoning item, which belongs before the message or call that it led to.",
            "input",
        )
    return messages, places


def _item(raw: dict[str, Any], at: str) -> Item:
    try:
        return msgspec.convert({"type": "message"} | raw, Item)
    except (msgspec.ValidationError, RecursionError) as error:
        raise schema_error(error, at) from error


def _content(content: str | Sequence[InputText | InputImage | OutputText]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, InputImage):
            address = {"url": part.image_url}
            if part.detail is not None:
                address["detail"] = part.detail
            parts.append({"type": "image_url", "image_url": address})
        else:
            parts.append({"type": "text", "text": part.text})
    return parts
