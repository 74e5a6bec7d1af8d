"""`/v1/chat/completions`: a request becomes a job, its deltas and output become OpenAI's objects."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gemcut.data import TokenLogprobs
from gemcut.engine.loop import Job
from gemcut.engine.model_files import ModelFiles
from gemcut.outputs import CompletionOutput, Delta, RequestOutput, ToolCall
from gemcut.server import protocol
from gemcut.server.answerer import Answerer, Conversation, check_complete, reasoning_tokens
from gemcut.server.exchange import encode
from gemcut.server.protocol import ChatRequest
from gemcut.server.stream import DONE, PING, Chunks
from gemcut.server.tool_choice import ToolChoice, form_of

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this


def conversation(request: ChatRequest | protocol.TokenizeRequest, *, thinks: bool) -> Conversation:
    """What a request wants rendered."""
    assert request.messages is not None, "the caller has looked"
    template, processor = request.chat_template_kwargs, request.mm_processor_kwargs
    tools = protocol.tools_of(request.tools)
    hides_tools = isinstance(request, ChatRequest) and tool_choice(request).hidden
    adds = not isinstance(request, protocol.TokenizeRequest) or request.add_generation_prompt is not False
    return Conversation(
        messages=protocol.messages_of(request.messages),
        tools=() if hides_tools else tools,
        enable_thinking=thinks,
        preserve_thinking=bool(template and template.preserve_thinking),
        add_generation_prompt=adds,
        image_tokens=None if processor is None else processor.max_soft_tokens,
    )


async def chat_job(answerer: Answerer, request: ChatRequest, salt: bytes) -> Job:
    """The job of a chat completion. Raises InvalidRequest."""
    choice = tool_choice(request)
    tools = protocol.tools_of(request.tools)
    asked = protocol.structure(request)
    strict = [tool.function.name for tool in request.tools or () if tool.function.strict]
    form = await form_of(answerer, choice, tools, asked, strict=strict, schemas="function.parameters")
    params = protocol.chat_sampling(
        request, structured_outputs=form, stop_ids=choice.stop_ids(answerer.files)
    )
    priority = protocol.check_priority(request.priority)
    thinks = protocol.thinks(request.reasoning_effort, request.chat_template_kwargs)
    prompt = await answerer.chat_prompt(conversation(request, thinks=thinks))
    return answerer.job(prompt, params, chat=True, priority=priority, salt=salt)


def tool_choice(request: ChatRequest) -> ToolChoice:
    """What a request says of calls."""
    choice, single = request.tool_choice, request.parallel_tool_calls is False
    if isinstance(choice, protocol.NamedTool):
        return ToolChoice(forced=True, only=(choice.function.name,), single=single)
    if isinstance(choice, protocol.AllowedTools):
        allowed = choice.allowed_tools
        names = tuple(tool.function.name for tool in allowed.tools)
        return ToolChoice(forced=allowed.mode == "required", only=names, single=single)
    # what the model does not know it cannot call
    return ToolChoice(hidden=choice == "none", forced=choice == "required", single=single)


class ChatWriter:
    """Writes the answers to one chat completion, whole or in chunks."""

    def __init__(self, answerer: Answerer, request: ChatRequest, job: Job) -> None:
        self._files, self._request, self._job = answerer.files, request, job
        options = request.stream_options
        self._wants_usage = bool(options and options.include_usage)
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": int(time.time()),
            "model": request.model or answerer.config.served_model_names[0],
        }
        self._chunks = Chunks(self._head, usage_null=self._wants_usage)
        self._begun: set[int] = set()
        self._num_calls: dict[int, int] = {}

    def whole(self, output: RequestOutput) -> bytes:
        """The body of an answer that is not streamed."""
        choices = []
        for answer in output.outputs:
            choice: dict[str, Any] = {
                "index": answer.index,
                "message": self._message(answer),
                "logprobs": self._logprobs(answer.logprobs or ()),
                "finish_reason": answer.finish_reason,
            }
            if self._request.return_token_ids:
                choice["token_ids"] = answer.token_ids
            choices.append(choice)
        payload = self._head | {"choices": choices, "usage": usage(self._files, self._job, output)}
        if self._request.return_token_ids:
            payload["prompt_token_ids"] = self._job.prompt.prompt.token_ids
        if self._request.prompt_logprobs is not None:
            payload["prompt_logprobs"] = prompt_logprobs(self._files, output)
        return encode(payload)

    def events(self, deltas: Sequence[Delta], output: RequestOutput | None) -> bytes:
        """Events of an answer that is: of its latest news, the output with the last. Nothing for tokens
        without text (half a character, a control). Raises what cut the answer off."""
        if output is None:
            return b"".join([self._event(delta) for delta in merged(deltas)]) if deltas else PING
        check_complete(output)
        pieces = [self._malformed(answer) for answer in output.outputs if answer.malformed_calls]
        pieces += [self._event(delta) for delta in merged(deltas)]
        if self._wants_usage:
            pieces.append(self._chunks.usage(usage(self._files, self._job, output)))
        return b"".join([*pieces, DONE])

    def _malformed(self, answer: CompletionOutput) -> bytes:
        """What the model wrote as calls and nobody can read: it is not lost."""
        delta = {"malformed_tool_calls": answer.malformed_calls}
        choice = {"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._chunks.choice(choice)

    def _event(self, delta: Delta) -> bytes:
        if delta.finish_reason not in (None, "stop", "length", "tool_calls"):
            return b""  # `check_complete` raises on it
        if self._is_text(delta):
            return self._chunks.text(delta.index, delta.text)
        body: dict[str, Any] = {}
        if delta.index not in self._begun:
            body["role"] = "assistant"
        if delta.reasoning:
            body["reasoning"] = body["reasoning_content"] = delta.reasoning
        if delta.text or (set(body) == {"role"} and not delta.tool_calls):
            body["content"] = delta.text
        if delta.tool_calls:
            first = self._num_calls.get(delta.index, 0)
            self._num_calls[delta.index] = first + len(delta.tool_calls)
            body["tool_calls"] = [
                {"index": first + i, **tool_call(call)} for i, call in enumerate(delta.tool_calls)
            ]
        ids = self._request.return_token_ids and delta.token_ids
        if (
            set(body) <= {"role", "content"}
            and not body.get("content")
            and not (delta.finish_reason or ids or delta.logprobs)
        ):
            return b""
        self._begun.add(delta.index)
        choice: dict[str, Any] = {
            "index": delta.index,
            "delta": body,
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }
        if ids:
            choice["token_ids"] = delta.token_ids
        return self._chunks.choice(choice)

    def _is_text(self, delta: Delta) -> bool:
        """There is nothing but more text, as in most deltas."""
        return (
            delta.text != ""
            and delta.index in self._begun
            and not (delta.reasoning or delta.tool_calls or delta.finish_reason or delta.logprobs)
            and not self._request.return_token_ids
        )

    def _message(self, answer: CompletionOutput) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.text if answer.text or not answer.tool_calls else None,
            "refusal": None,
        }
        if answer.reasoning:
            message["reasoning"] = message["reasoning_content"] = answer.reasoning
        if answer.tool_calls:
            message["tool_calls"] = [tool_call(call) for call in answer.tool_calls]
        if answer.malformed_calls:
            message["malformed_tool_calls"] = answer.malformed_calls
        return message

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._request.logprobs or not entries:
            return None
        return {"content": [logprob_entry(self._files, entry) for entry in entries], "refusal": None}


def tool_call(call: ToolCall) -> dict[str, Any]:
    """A complete call: in a stream too, so that its arguments are valid JSON at any time."""
    arguments = encode(call.arguments).decode()
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def merged(deltas: Sequence[Delta]) -> Sequence[Delta]:
    """One delta for each answer: news that came together go out together."""
    if len(deltas) < 2:
        return deltas
    groups: dict[int, list[Delta]] = {}
    for delta in deltas:
        groups.setdefault(delta.index, []).append(delta)
    return [group[0] if len(group) == 1 else _joined(group) for group in groups.values()]


def _joined(group: Sequence[Delta]) -> Delta:
    return Delta(
        index=group[0].index,
        text="".join(delta.text for delta in group),
        reasoning="".join(delta.reasoning for delta in group),
        token_ids=tuple(i for delta in group for i in delta.token_ids),
        call_started=tuple(name for delta in group for name in delta.call_started),
        tool_calls=tuple(call for delta in group for call in delta.tool_calls),
        logprobs=tuple(entry for delta in group for entry in delta.logprobs),
        finish_reason=group[-1].finish_reason,
    )


def usage(files: ModelFiles, job: Job, *outputs: RequestOutput) -> dict[str, Any]:
    """OpenAI's usage of one job or several."""
    prompt = sum(output.usage.prompt_tokens for output in outputs)
    completion = sum(output.usage.completion_tokens for output in outputs)
    opening, closing = (files.tokenizer.control_id(token) for token in ("<|channel>", "<channel|>"))
    reasoning = sum(
        reasoning_tokens(answer.token_ids, opening, closing, job.prompt.in_thought)
        for output in outputs
        for answer in output.outputs
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(output.usage.cached_tokens for output in outputs),
            "image_tokens": sum(output.usage.image_tokens for output in outputs),
        },
        "completion_tokens_details": {"reasoning_tokens": reasoning if job.chat else 0},
    }


def token_text(files: ModelFiles, token_id: int) -> tuple[str, list[int] | None]:
    """A token's text, and its bytes (it may be part of a character), None where they depend on its place."""
    if token_id >= files.tokenizer.vocab_size:
        return "", []  # the logits are wider than the vocabulary
    octets = files.tokenizer.spelling(token_id)
    return files.tokenizer.decode((token_id,)), None if octets is None else list(octets)


def finite(logprob: float) -> float:
    """A log-probability as JSON can carry it."""
    return max(logprob, LEAST_LOGPROB)


def logprob_entry(files: ModelFiles, entry: TokenLogprobs) -> dict[str, Any]:
    """OpenAI's entry for one token of a chat."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        text, octets = token_text(files, token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": octets}

    top = [one(token_id, logprob) for token_id, logprob in entry.top]
    return {**one(entry.token_id, entry.logprob), "top_logprobs": top}


def prompt_logprobs(files: ModelFiles, output: RequestOutput) -> list[Mapping[str, Any] | None]:
    """For each prompt token, as vLLM writes them: id -> logprob, rank and text. The first has none."""
    entries: list[Mapping[str, Any] | None] = []
    for entry in output.prompt_logprobs or ():
        if entry is None:
            entries.append(None)
            continue
        own = (entry.token_id, entry.logprob, entry.rank)
        ranked = {own[0]: own} | {t: (t, logprob, i + 1) for i, (t, logprob) in enumerate(entry.top)}
        entries.append(
            {
                str(t): {
                    "logprob": finite(logprob),
                    "rank": rank,
                    "decoded_token": token_text(files, t)[0],
                }
                for t, logprob, rank in ranked.values()
            }
        )
    return entries
