"""Every field of every request: it changes what the engine is asked, or what is sent back, or it is listed
here as one that says something about the request alone. Nothing is taken and ignored."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, cast

import msgspec
import pytest
from server_rig import DATA_URI, Reply, Server

from gemcut.demo import CHECKPOINT
from gemcut.engine.loop import Job
from gemcut.engine.model_files import ModelFiles
from gemcut.server import anthropic, chat, completions, openapi, protocol, responses
from gemcut.server.answerer import Answerer
from gemcut.server.door import Keys
from gemcut.server.engine_client import EngineClient
from gemcut.server.metrics import Metrics
from gemcut.server.settings import ServerConfig

TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"const": 1}}}}
CHAT_TOOLS = [{"type": "function", "function": TOOL}]
OWN_TOOLS = [{"type": "function", **TOOL}]
CLAUDE_TOOLS = [{"name": "f", "input_schema": TOOL["parameters"]}]
USER = {"role": "user", "content": "script:hello"}
PICTURE = {"type": "image_url", "image_url": {"url": DATA_URI}}
OWN_PICTURE = {"type": "input_image", "image_url": DATA_URI}
SCHEMA = {"type": "object"}

# What a field needs beside it, where it is not a body that has only what is required.
CHAT = {"messages": [USER]}
PLAIN = {"prompt": "script:hello"}
OWN = {"input": "script:hello"}
CLAUDE = {"model": "scripted", "max_tokens": 50, "messages": [USER]}

# field -> a value that changes the job, or (beside, value)
SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.5,
    "presence_penalty": 1.0,
    "frequency_penalty": 1.0,
    "repetition_penalty": 1.5,
    "seed": 7,
    "stop": "x",
    "structured_outputs": {"choice": ["a"]},
    "cache_salt": "x",
    "priority": 3,
}
BOTH_OF_OPENAI = SAMPLING | {
    "logit_bias": {"5": 1},
    "max_tokens": 5,
    "n": 2,
    "min_tokens": 1,
    "ignore_eos": True,
    "stop_token_ids": [5],
    "allowed_token_ids": [5],
    "prompt_logprobs": 1,
}
JOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "/v1/chat/completions": (
        CHAT,
        BOTH_OF_OPENAI
        | {
            "messages": [USER, USER],
            "logprobs": True,
            "top_logprobs": ({"logprobs": True}, 3),
            "max_completion_tokens": 5,
            "response_format": {"type": "json_object"},
            "tools": CHAT_TOOLS,
            "tool_choice": ({"tools": CHAT_TOOLS}, "required"),
            "parallel_tool_calls": ({"tools": CHAT_TOOLS}, False),
            "reasoning_effort": "low",
            "thinking_token_budget": ({"reasoning_effort": "low"}, 5),
            "chat_template_kwargs": {"enable_thinking": True},
            "mm_processor_kwargs": (
                {"messages": [{"role": "user", "content": [PICTURE]}]},
                {"max_soft_tokens": 280},
            ),
        },
    ),
    "/v1/completions": (PLAIN, BOTH_OF_OPENAI | {"prompt": "other", "logprobs": 2}),
    "/v1/responses": (
        OWN,
        SAMPLING
        | {
            "input": "other",
            "instructions": "Be brief.",
            "max_output_tokens": 5,
            "reasoning": {"effort": "low"},
            "thinking_token_budget": ({"reasoning": {"effort": "low"}}, 5),
            "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
            "tools": OWN_TOOLS,
            "tool_choice": ({"tools": OWN_TOOLS}, {"type": "function", "name": "f"}),
            "parallel_tool_calls": ({"tools": OWN_TOOLS}, False),
            "mm_processor_kwargs": (
                {"input": [{"role": "user", "content": [OWN_PICTURE]}]},
                {"max_soft_tokens": 280},
            ),
        },
    ),
    "/v1/messages": (
        CLAUDE,
        {
            "max_tokens": 5,
            "messages": [USER, USER],
            "system": "Be brief.",
            "tools": CLAUDE_TOOLS,
            "tool_choice": ({"tools": CLAUDE_TOOLS}, {"type": "any"}),
            "thinking": {"type": "enabled", "budget_tokens": 9},
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
            "stop_sequences": ["x"],
            "temperature": 0.5,
            "top_k": 3,
            "top_p": 0.5,
        },
    ),
}
# field -> (beside, value) that changes what is sent back
ANSWERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "/v1/chat/completions": (
        CHAT,
        {
            "stream": True,
            "stream_options": ({"stream": True}, {"include_usage": True}),
            "return_token_ids": True,
        },
    ),
    "/v1/completions": (
        PLAIN,
        {
            "stream": True,
            "stream_options": ({"stream": True}, {"include_usage": True}),
            "return_token_ids": True,
        },
    ),
    "/v1/responses": (OWN, {"stream": True, "metadata": {"a": "b"}, "user": "x", "safety_identifier": "x"}),
    "/v1/messages": (CLAUDE, {"stream": True}),
    "/v1/messages/count_tokens": (
        {"model": "scripted", "messages": [USER]},
        {
            "messages": [USER, USER],
            "system": "x",
            "tools": CLAUDE_TOOLS,
            "tool_choice": ({"tools": CLAUDE_TOOLS}, {"type": "none"}),
            "thinking": {"type": "adaptive"},
        },
    ),
    "/tokenize": (
        {"messages": [USER]},
        {
            "messages": [USER, USER],
            "tools": CHAT_TOOLS,
            "add_generation_prompt": False,
            "return_token_strs": True,
            "chat_template_kwargs": {"enable_thinking": True},
            "mm_processor_kwargs": (
                {"messages": [{"role": "user", "content": [PICTURE]}]},
                {"max_soft_tokens": 280},
            ),
        },
    ),
    "/detokenize": ({"tokens": [70]}, {"tokens": [71]}),
}
# Which model is asked; who asks, and for what; what holds in any case. The values that are taken.
ABOUT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"modalities": ["text"]},
    "/v1/completions": {"best_of": 1, "echo": False, "suffix": None},
    "/v1/responses": {
        "truncation": "disabled",
        "previous_response_id": None,
        "background": False,
        "stream_options": None,
    },
    "/v1/messages": {
        "metadata": {"user_id": "x"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
    },
    # a request's form is checked, though it is no part of its prompt
    "/v1/messages/count_tokens": {
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        "cache_control": {"type": "ephemeral"},
    },
    "/tokenize": {"prompt": None, "add_special_tokens": None},
    "/detokenize": {},
}
ABOUT_ALL = {"model": "scripted"}
ABOUT_OPENAI = {
    "user": "x",
    "metadata": {"a": "b"},
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "store": False,
    "service_tier": "auto",
}
OF_OPENAI = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def about(path: str) -> dict[str, Any]:
    return ABOUT_ALL | ABOUT[path] | (ABOUT_OPENAI if path in OF_OPENAI else {})


@pytest.fixture(scope="module")
def answerer() -> Iterator[Answerer]:
    """Makes jobs; there is no engine to hand them to."""
    config = ServerConfig(served_model_names=("scripted",))
    made = Answerer(ModelFiles.open(CHECKPOINT), cast(EngineClient, None), config, cast(Metrics, None))
    yield made
    made.close()


def asked(answerer: Answerer, path: str, body: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What the engine is asked by a body."""
    request: Any = protocol.Reader(openapi.BODIES[path]).read(json.dumps(body).encode())
    salt = Keys(()).salt(None, getattr(request, "cache_salt", None))

    async def jobs() -> list[Job]:
        if isinstance(request, protocol.ChatRequest):
            return [await chat.chat_job(answerer, request, salt)]
        if isinstance(request, protocol.CompletionRequest):
            return await completions.completion_jobs(answerer, request, salt)
        if isinstance(request, responses.ResponsesRequest):
            return [await responses.responses_job(answerer, request, salt)]
        return [await anthropic.messages_job(answerer, request, salt)]

    return [
        (job.prompt.prompt, job.prompt.may_think, job.params, job.priority, job.salt)
        for job in asyncio.run(jobs())
    ]


def with_field(base: dict[str, Any], field: str, given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A body without a field, and one with it."""
    beside, value = given if isinstance(given, tuple) else ({}, given)
    return base | beside, base | beside | {field: value}


def test_every_field_is_in_the_tables() -> None:
    for path, kind in openapi.BODIES.items():
        fields = {field.encode_name for field in msgspec.structs.fields(kind)}
        listed = set(about(path))
        for table in (JOBS, ANSWERS):
            listed |= set(table[path][1]) if path in table else set()
        assert listed == fields, path


@pytest.mark.parametrize("path", JOBS)
def test_what_changes_the_question(answerer: Answerer, path: str) -> None:
    base, fields = JOBS[path]
    for field, given in fields.items():
        without, having = with_field(base, field, given)
        assert asked(answerer, path, without) != asked(answerer, path, having), field


def test_strict_tools_are_held_to_their_schemas(answerer: Answerer) -> None:
    for path, base, tool in (
        ("/v1/chat/completions", CHAT, CHAT_TOOLS[0]),
        ("/v1/responses", OWN, OWN_TOOLS[0]),
        ("/v1/messages", CLAUDE, CLAUDE_TOOLS[0]),
    ):
        spec = {**TOOL, "strict": True}
        strict = {**tool, "function": spec} if "function" in tool else {**tool, "strict": True}
        (free,), (held,) = (asked(answerer, path, base | {"tools": [given]}) for given in (tool, strict))
        assert free[0] == held[0]  # the prompt says nothing of it
        assert free[2].structured_outputs is None
        assert held[2].structured_outputs is not None, path


@pytest.mark.parametrize("path", ANSWERS)
def test_what_changes_the_answer(scripted: Server, path: str) -> None:
    base, fields = ANSWERS[path]

    def shape(reply: Reply) -> Any:
        """A reply without what differs each time."""
        assert reply.status == 200, reply.body
        if reply.headers["content-type"].startswith("text/event-stream"):
            return [sorted(event) if isinstance(event, dict) else event for event in reply.events()]
        volatile = ("id", "created", "created_at", "completed_at", "usage", "output")
        return {key: value for key, value in reply.json.items() if key not in volatile}

    for field, given in fields.items():
        without, having = with_field(base, field, given)
        assert shape(scripted.post(path, without)) != shape(scripted.post(path, having)), field


@pytest.mark.parametrize("path", ABOUT)
def test_what_says_something_about_the_request_is_taken(scripted: Server, path: str) -> None:
    base = (JOBS | ANSWERS)[path][0]
    for field, value in about(path).items():
        reply = scripted.post(path, base | {field: value})
        assert reply.status == 200, (field, reply.body)


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"messages": [USER], "add_special_tokens": False}, "add_special_tokens"),
        ({"prompt": "x", "tools": CHAT_TOOLS}, "tools"),
        ({"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"prompt": "x", "chat_template_kwargs": {}}, "chat_template_kwargs"),
        ({"prompt": "x", "mm_processor_kwargs": {}}, "mm_processor_kwargs"),
        ({"prompt": "x", "messages": [USER]}, "prompt"),
        ({}, "prompt"),
    ],
    ids=str,
)
def test_what_does_not_go_together(scripted: Server, wrong: dict[str, Any], param: str) -> None:
    reply = scripted.post("/tokenize", wrong)
    assert reply.status == 400
    assert reply.error["param"] == param


@pytest.mark.parametrize(
    ("path", "field", "value", "said"),
    [
        ("/v1/chat/completions", "store", True, "store: true is not supported. Leave it out."),
        ("/v1/completions", "echo", True, "echo: true is not supported. Leave it out."),
        ("/v1/completions", "suffix", "x", "suffix is not supported. Leave it out."),
        ("/v1/completions", "n", "x", "n: expected `int | null`, got `str`."),
    ],
)
def test_what_is_not_supported_is_said_plainly(
    scripted: Server, path: str, field: str, value: Any, said: str
) -> None:
    asked = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    reply = scripted.post(path, {**asked, field: value})
    assert (reply.status, reply.error["param"], reply.error["message"]) == (400, field, said)


def test_an_unreadable_call_goes_back_as_text(answerer: Answerer) -> None:
    said = {"role": "assistant", "content": "Wait.", "malformed_tool_calls": ["call:weather{city"]}
    spelled = {"role": "assistant", "content": "Wait.call:weather{city"}
    one, other = (
        asked(answerer, "/v1/chat/completions", {"messages": [USER, message, USER]})
        for message in (said, spelled)
    )
    assert one == other


def test_a_failed_tool_says_so(answerer: Answerer) -> None:
    def prompt(content: Any, is_error: bool) -> Any:
        use = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "t", "content": content, "is_error": is_error}
        history = [USER, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
        return asked(answerer, "/v1/messages", CLAUDE | {"messages": history})

    assert prompt("no such city", True) == prompt("Error: no such city", False)
    assert prompt([{"type": "text", "text": "no such city"}], True) == prompt("Error: no such city", False)
