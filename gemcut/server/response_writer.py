"""Outputs become OpenAI's response objects, or the events that build one up.

Events bear consecutive sequence numbers. Each item is added, filled and done before the next one is added;
the last event holds the whole response, which is what a request without a stream gets.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from gemcut.engine.loop import Job
from gemcut.outputs import Delta, RequestOutput, ToolCall
from gemcut.server import chat
from gemcut.server.answerer import Answerer, check_complete
from gemcut.server.errors import message_of
from gemcut.server.exchange import encode
from gemcut.server.responses import ResponsesRequest
from gemcut.server.stream import PING, named_event

# kinds of items that fill up: the type of their one part, and what the events call it
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


class ResponseWriter:
    """Writes one response, whole or as events."""

    def __init__(self, answerer: Answerer, request: ResponsesRequest, job: Job) -> None:
        self._files, self._job = answerer.files, job
        self._facts = _facts(request, job, answerer)
        self._number = 0  # of the next event
        self._done: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the item that is being filled
        self._text: list[str] = []  # and its text so far

    def whole(self, output: RequestOutput) -> bytes:
        """The body of a response that is not streamed."""
        (answer,) = output.outputs
        self._take(Delta(index=0, text=answer.text, reasoning=answer.reasoning, tool_calls=answer.tool_calls))
        _, response = self._end(output)
        return encode(response)

    def events(self, deltas: Sequence[Delta], output: RequestOutput | None) -> bytes:
        """The events of a response that is: of its latest news, the output with the last. Nothing for tokens
        without text. Raises what cut the response off; `failed` then writes the last event."""
        pieces = self._start() if self._number == 0 else []
        if output is not None:
            check_complete(output)
        elif not deltas:
            return b"".join(pieces) or PING
        for delta in deltas:
            pieces += self._take(delta)
        if output is not None:
            last, response = self._end(output)
            pieces += [*last, self._event(f"response.{response['status']}", response=response)]
        return b"".join(pieces)

    def failed(self, error: BaseException) -> bytes:
        """The last event of a stream that was cut off."""
        response = self._response("failed")
        # the other codes are of what may be wrong with a request
        response["error"] = {"code": "server_error", "message": message_of(error)}
        return self._event("response.failed", response=response)

    # ---- items

    def _start(self) -> list[bytes]:
        response = self._response("in_progress")
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def _take(self, delta: Delta) -> list[bytes]:
        pieces: list[bytes] = []
        for kind, text in (("reasoning", delta.reasoning), ("message", delta.text)):
            if text:
                pieces += self._fill(kind, text)
        for call in delta.tool_calls:
            pieces += self._close() + self._call(call)
        return pieces

    def _end(self, output: RequestOutput) -> tuple[list[bytes], dict[str, Any]]:
        """The last pieces of the items, and the response that they add up to."""
        (answer,) = output.outputs
        is_cut = answer.finish_reason == "length"
        pieces: list[bytes] = []
        # what the model wrote as calls and nobody can read is not lost
        if answer.malformed_calls or not (self._done or self._open):
            pieces += self._fill("message", "".join(answer.malformed_calls))
        pieces += self._close("incomplete" if is_cut else "completed")
        response = self._response("incomplete" if is_cut else "completed")
        if is_cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        response["usage"] = self._usage(output)
        return pieces, response

    def _fill(self, kind: str, text: str) -> list[bytes]:
        """More text for an item of this kind, which is begun unless it is open."""
        pieces: list[bytes] = []
        if self._open is None or self._open["type"] != kind:
            pieces += self._close()
            item: dict[str, Any] = {"id": _id("msg" if kind == "message" else "rs"), "type": kind}
            item |= {"role": "assistant"} if kind == "message" else {"summary": []}
            self._open, self._text = item | {"status": "in_progress", "content": []}, []
            pieces.append(self._event("response.output_item.added", **self._at(), item=self._open))
            part = _part(_PARTS[kind], "")
            pieces.append(self._event("response.content_part.added", **self._place(), part=part))
        self._text.append(text)
        if text:
            more = {"delta": text} | ({"logprobs": []} if kind == "message" else {})
            pieces.append(self._event(f"response.{_PARTS[kind]}.delta", **self._place(), **more))
        return pieces

    def _close(self, status: str = "completed") -> list[bytes]:
        """End the item that is open."""
        if self._open is None:
            return []
        kind, text = _PARTS[self._open["type"]], "".join(self._text)
        part = _part(kind, text)
        more = {"text": text} | ({"logprobs": []} if kind == "output_text" else {})
        place = self._place()
        item = self._open | {"status": status, "content": [part]}
        pieces = [
            self._event(f"response.{kind}.done", **place, **more),
            self._event("response.content_part.done", **place, part=part),
            self._event("response.output_item.done", **self._at(), item=item),
        ]
        self._done.append(item)
        self._open = None
        return pieces

    def _call(self, call: ToolCall) -> list[bytes]:
        """A call is complete when it comes, so its arguments are valid JSON in one piece."""
        arguments = encode(call.arguments).decode()
        item = {"id": _id("fc"), "type": "function_call", "call_id": _id("call"), "name": call.name}
        begun = item | {"arguments": "", "status": "in_progress"}
        done = item | {"arguments": arguments, "status": "completed"}
        place = self._at() | {"item_id": item["id"]}
        name = "response.function_call_arguments"
        pieces = [
            self._event("response.output_item.added", **self._at(), item=begun),
            self._event(f"{name}.delta", **place, delta=arguments),
            self._event(f"{name}.done", **place, name=call.name, arguments=arguments),
            self._event("response.output_item.done", **self._at(), item=done),
        ]
        self._done.append(done)
        return pieces

    def _at(self) -> dict[str, Any]:
        return {"output_index": len(self._done)}

    def _place(self) -> dict[str, Any]:
        assert self._open is not None, "there is an item"
        return self._at() | {"item_id": self._open["id"], "content_index": 0}

    def _event(self, name: str, /, **fields: Any) -> bytes:
        payload = {"type": name, "sequence_number": self._number, **fields}
        self._number += 1
        return named_event(name, payload)

    # ---- the response

    def _response(self, status: str) -> dict[str, Any]:
        return self._facts | {"status": status, "output": list(self._done)}

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        usage = chat.usage(self._files, self._job, output)
        return {
            "input_tokens": usage["prompt_tokens"],
            # nothing is charged for what goes into the cache
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }


def _facts(request: ResponsesRequest, job: Job, answerer: Answerer) -> dict[str, Any]:
    """What a response repeats of its request, with what was left open filled in."""
    params = answerer.files.defaults.fill(job.params)
    asked = msgspec.to_builtins(request)
    reasoning, text = asked["reasoning"] or {}, asked["text"] or {}
    return {
        "id": _id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": request.model or answerer.config.served_model_names[0],
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": params.temperature,
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": asked["tool_choice"] or "auto",
        "tools": [tool | {"strict": bool(tool["strict"])} for tool in asked["tools"] or ()],
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
        "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
    }


def _part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text} | ({"annotations": []} if kind == "output_text" else {})


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
