"""OpenAI's request bodies: schemas, and what they become for the engine.

Enters: JSON. Leaves: structs, `SamplingParams`, messages as the template reads them. A field that is not in a
schema is refused by name, so nothing is ignored in silence. It must not know HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from gemcut.errors import InvalidRequest
from gemcut.sampling import SamplingParams, StructuredOutputs
from gemcut.server.errors import schema_error

MAX_STOPS, MAX_STOP_CHARACTERS, MAX_IDS = 16, 1024, 4096
MAX_MESSAGES, MAX_TOOLS, MAX_PROMPTS = 4096, 256, 64
# how a body says that the model shall think first; the others say that it shall not
THINKING_EFFORTS = {"low", "medium", "high", "xhigh", "max"}

T = TypeVar("T")


class Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A body, or a part of one, in which every field is known."""


# ---- messages


class TextPart(Strict, tag_field="type", tag="text"):
    text: str


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImageUrlPart(Strict, tag_field="type", tag="image_url"):
    image_url: ImageUrl | str


class ImagePart(Strict, tag_field="type", tag="image"):
    """gemcut's own, as in its Python API: a data URI or base64 text."""

    image: str | None = None
    url: str | None = None
    base64: str | None = None


ContentPart = TextPart | ImageUrlPart | ImagePart
Content = str | list[ContentPart]


class SystemMessage(Strict, tag_field="role", tag="system"):
    content: str | list[TextPart]


class DeveloperMessage(Strict, tag_field="role", tag="developer"):
    content: str | list[TextPart]


class UserMessage(Strict, tag_field="role", tag="user"):
    content: Content


class CalledFunction(Strict):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCallPart(Strict):
    """index: as in the chunks of a stream, the place in the list."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None


class AssistantMessage(Strict, tag_field="role", tag="assistant"):
    """Also what a server answered with, sent back: fields that gemcut never fills may be null or empty.

    malformed_tool_calls: calls that could not be read; they go back as the text that they are.
    """

    content: Content | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallPart] | None = None
    malformed_tool_calls: list[str] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class ToolMessage(Strict, tag_field="role", tag="tool"):
    """name: of the function, which must be the called one's."""

    content: Content
    tool_call_id: str | None = None
    name: str | None = None


ChatMessage = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


# ---- tools and forms of answers


class FunctionSpec(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    response: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    function: FunctionSpec
    type: Literal["function"] = "function"


class FunctionName(Strict):
    name: str


class NamedTool(Strict, tag_field="type", tag="function"):
    function: FunctionName


class NamedTools(Strict):
    tools: list[NamedTool]
    mode: Literal["auto", "required"]


class AllowedTools(Strict, tag_field="type", tag="allowed_tools"):
    allowed_tools: NamedTools


class JsonSchema(Strict):
    """strict: the schema is held to in any case."""

    name: str
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Strict, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(Strict, tag_field="type", tag="json_object"):
    pass


class JsonSchemaFormat(Strict, tag_field="type", tag="json_schema"):
    json_schema: JsonSchema


class StructuredForm(Strict):
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TemplateOptions(Strict):
    enable_thinking: bool | None = None
    preserve_thinking: bool | None = None


class ProcessorOptions(Strict):
    max_soft_tokens: int | None = None


# ---- requests


class Common(Strict):
    """Fields of chat and plain completions."""

    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    # about the request, not about the answer
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    # gemcut's and other engines' own
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredForm | None = None
    cache_salt: str | None = None
    priority: int | None = None
    return_token_ids: bool | None = None


class ChatRequest(Common, kw_only=True):
    messages: list[ChatMessage]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    modalities: list[Literal["text"]] | None = None
    thinking_token_budget: int | None = None
    chat_template_kwargs: TemplateOptions | None = None
    mm_processor_kwargs: ProcessorOptions | None = None


class CompletionRequest(Common, kw_only=True):
    prompt: str | list[str | int | list[int]]  # of one of these kinds
    logprobs: int | None = None
    best_of: int | None = None
    echo: Literal[False] | None = None
    suffix: None = None


class TokenizeRequest(Strict):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool = False
    chat_template_kwargs: TemplateOptions | None = None
    mm_processor_kwargs: ProcessorOptions | None = None


class DetokenizeRequest(Strict):
    tokens: list[int]
    model: str | None = None


class Reader:
    """Decodes bodies of one type."""

    def __init__(self, kind: type[T]) -> None:
        self._decoder = msgspec.json.Decoder(kind)

    def read(self, body: bytes) -> Any:
        """The request of a body. Raises InvalidRequest."""
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            raise schema_error(error) from error


# ---- to the engine's terms


def sampling(request: Common, *, logprobs: int | None, max_tokens: int | None, **more: Any) -> SamplingParams:
    """The choices that both kinds of completion share. Raises InvalidRequest."""
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    check_stops(stop, "stop")
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        if len(getattr(request, name) or ()) > MAX_IDS:
            raise InvalidRequest(f"{name} holds more than {MAX_IDS} ids.", name)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options goes with stream: true.", "stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("prompt_logprobs is not streamed. Send stream: false.", "prompt_logprobs")
    given = {
        "n": request.n,
        "min_p": request.min_p,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
        "min_tokens": request.min_tokens,
        "ignore_eos": request.ignore_eos,
    }
    return SamplingParams(
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        max_tokens=max_tokens,
        stop=tuple(stop),
        stop_token_ids=tuple(request.stop_token_ids or ()) + tuple(more.pop("stop_ids", ())),
        logit_bias=_logit_bias(request.logit_bias or {}),
        allowed_token_ids=None if request.allowed_token_ids is None else tuple(request.allowed_token_ids),
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
        seed=request.seed,
        **{name: value for name, value in given.items() if value is not None},
        **more,
    )


def check_stops(stop: Sequence[str], param: str) -> None:
    """Raise InvalidRequest if there are too many stop strings, or one is too long."""
    if len(stop) > MAX_STOPS or any(len(text) > MAX_STOP_CHARACTERS for text in stop):
        raise InvalidRequest(
            f"{param} holds at most {MAX_STOPS} strings of {MAX_STOP_CHARACTERS} characters.", param
        )


def check_priority(priority: int | None) -> int:
    """A client may step back, not push forward."""
    if priority is not None and not 0 <= priority <= 1000:
        raise InvalidRequest("priority must be from 0 (the usual) to 1000 (after all others).", "priority")
    return priority or 0


def chat_sampling(request: ChatRequest, **more: Any) -> SamplingParams:
    """The choices of a chat completion."""
    most = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    if request.max_tokens not in (None, most):
        raise InvalidRequest("max_tokens and max_completion_tokens differ; send one of them.", "max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs goes with logprobs: true.", "top_logprobs")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    budget = request.thinking_token_budget
    if budget is not None and not thinks(request.reasoning_effort, request.chat_template_kwargs):
        raise InvalidRequest(
            "thinking_token_budget goes with thinking: send reasoning_effort or enable_thinking.",
            "thinking_token_budget",
        )
    try:
        return sampling(request, logprobs=logprobs, max_tokens=most, max_thought_tokens=budget, **more)
    except InvalidRequest as error:
        if error.param == "logprobs":
            error.param = "top_logprobs"
        elif error.param == "max_tokens" and request.max_completion_tokens is not None:
            error.param = "max_completion_tokens"
        elif error.param == "max_thought_tokens":
            error.param = "thinking_token_budget"
        raise


def structure(request: ChatRequest | CompletionRequest) -> StructuredOutputs | None:
    """The form of the answer, from response_format or structured_outputs."""
    wanted = getattr(request, "response_format", None)
    form = request.structured_outputs
    if wanted is None or isinstance(wanted, TextFormat):
        return None if form is None else StructuredOutputs(**msgspec.structs.asdict(form))
    if form is not None:
        raise InvalidRequest(
            "response_format and structured_outputs are both given; send one of them.", "structured_outputs"
        )
    if isinstance(wanted, JsonObjectFormat):
        return StructuredOutputs(json_object=True)
    if wanted.json_schema.schema is None:
        raise InvalidRequest(
            "response_format.json_schema.schema is required.", "response_format.json_schema.schema"
        )
    return StructuredOutputs(json_schema=wanted.json_schema.schema)


def thinks(effort: str | None, options: TemplateOptions | None) -> bool:
    """Whether the model shall think first. Raises InvalidRequest if the two fields contradict."""
    by_effort = None if effort is None else effort in THINKING_EFFORTS
    by_option = None if options is None else options.enable_thinking
    if by_effort is not None and by_option is not None and by_effort != by_option:
        raise InvalidRequest(
            "reasoning_effort and chat_template_kwargs.enable_thinking contradict each other.",
            "reasoning_effort",
        )
    return bool(by_effort or by_option)


def messages_of(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as the template reads them. Raises InvalidRequest for arguments that are no JSON object."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequest(
            f"messages must hold 1 to {MAX_MESSAGES} messages, not {len(messages)}.", "messages"
        )
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: ChatMessage, at: str) -> dict[str, Any]:
    plain = {key: value for key, value in msgspec.to_builtins(message).items() if value is not None}
    if plain.pop("annotations", None):
        raise InvalidRequest(
            f"{at}.annotations must be empty: the model cannot be shown any.", f"{at}.annotations"
        )
    for k, call in enumerate(plain.get("tool_calls", ())):
        place = f"{at}.tool_calls[{k}]"
        if call.pop("index", None) not in (None, k):
            raise InvalidRequest(f"{place}.index must be {k}, its place in the list.", f"{place}.index")
        function = call["function"]
        function["arguments"] = arguments_of(function["arguments"], f"{place}.function.arguments")
    for text in plain.pop("malformed_tool_calls", ()):
        content = plain.get("content", "")
        is_text = isinstance(content, str)
        plain["content"] = content + text if is_text else [*content, {"type": "text", "text": text}]
    return plain


def arguments_of(arguments: str | dict[str, Any] | None, at: str) -> dict[str, Any]:
    """The arguments of a call. Raises InvalidRequest, with the place, for text that is no JSON object."""
    if not isinstance(arguments, str):
        return arguments or {}
    if not arguments.strip():
        return {}
    try:
        decoded = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise InvalidRequest(f"{at} is not valid JSON: {error}", at) from error
    if not isinstance(decoded, dict):
        raise InvalidRequest(f"{at} must be the JSON text of an object.", at)
    return decoded


def tools_of(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """Tools as the template reads them."""
    if len(tools or ()) > MAX_TOOLS:
        raise InvalidRequest(f"tools holds more than {MAX_TOOLS} functions.", "tools")
    listed = []
    for tool in tools or ():
        function = {key: v for key, v in msgspec.to_builtins(tool.function).items() if v is not None}
        function.pop("strict", None)
        listed.append({"type": "function", "function": function})
    return listed


def prompts_of(prompt: str | list[Any]) -> list[str | list[int]]:
    """The prompts of a completion request: one, or several. Raises InvalidRequest."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) != 1:
        what = "is empty" if not prompt else "mixes texts and ids"
        raise InvalidRequest(f"prompt {what}; it is a text, a list of texts, ids, or lists of ids.", "prompt")
    if kinds == {int}:
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(
            f"prompt holds {len(prompt)} prompts; at most {MAX_PROMPTS} are taken.", "prompt"
        )
    return prompt


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    bias = {}
    for token, value in given.items():
        if not token.isascii() or not token.isdigit() or len(token) > 9:
            raise InvalidRequest(f"logit_bias: {token[:40]!r} is no token id.", "logit_bias")
        bias[int(token)] = value
    return bias
