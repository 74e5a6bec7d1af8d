"""Anthropic's own SDK as the client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import pytest
from server_rig import DATA_URI, Server

TOOLS: list[Any] = [
    {
        "name": "weather",
        "description": "The weather of a city.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
]
GREEDY = {"temperature": 0}  # the newest SDK has no argument for it; older ones send it
PICTURE: Any = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": DATA_URI.partition(",")[2]},
}


def client(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0)


def ask(script: str) -> list[Any]:
    return [{"role": "user", "content": f"script:{script}"}]


def test_a_picture_is_answered(demo: Server) -> None:
    question: list[Any] = [
        {"role": "user", "content": [PICTURE, {"type": "text", "text": "What does the sign say?"}]}
    ]
    with client(demo) as api:
        done = api.messages.create(model="gemcut-demo", max_tokens=20, messages=question, extra_body=GREEDY)
        counted = api.messages.count_tokens(model="gemcut-demo", messages=question)
    assert [(block.type, getattr(block, "text", "")) for block in done.content] == [("text", "GEMCUT")]
    assert (done.stop_reason, done.stop_sequence) == ("end_turn", None)
    cached = done.usage.cache_read_input_tokens or 0
    assert done.usage.input_tokens + cached == counted.input_tokens == 82


def test_a_schema_rules_the_answer(demo: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form: Any = {"format": {"type": "json_schema", "schema": schema}}
    with client(demo) as api:
        done = api.messages.create(
            model="gemcut-demo", max_tokens=500, messages=ask("x"), output_config=form, extra_body=GREEDY
        )
    (block,) = done.content
    assert block.type == "text"
    assert json.loads(block.text) in ({"a": 1}, {"a": 2})


def test_a_call_is_forced(demo: Server) -> None:
    tools: list[Any] = [
        {"name": "stop", "input_schema": {"type": "object", "properties": {}}},
        {
            "name": "go",
            "input_schema": {
                "type": "object",
                "properties": {"to": {"enum": ["a", "b"]}},
                "required": ["to"],
            },
        },
    ]
    with client(demo) as api:
        given: Any = {"model": "gemcut-demo", "max_tokens": 300, "messages": ask("x"), "tools": tools}
        once = {"disable_parallel_tool_use": True}
        done = api.messages.create(**given, tool_choice={"type": "any", **once})
        (block,) = done.content
        assert block.type == "tool_use"
        assert (block.name, block.input) in [("stop", {}), ("go", {"to": "a"}), ("go", {"to": "b"})]
        assert done.stop_reason == "tool_use"
        with api.messages.stream(**given, tool_choice={"type": "tool", "name": "go", **once}) as stream:
            (block,) = stream.get_final_message().content
        assert block.type == "tool_use"
        assert (block.name, block.input) in [("go", {"to": "a"}), ("go", {"to": "b"})]


def test_thinking_and_tools_and_their_way_back(scripted: Server) -> None:
    with client(scripted) as api:
        given: Any = {
            "model": "scripted",
            "max_tokens": 200,
            "tools": TOOLS,
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            "thinking": {"type": "enabled", "budget_tokens": 199},
        }
        done = api.messages.create(**given, messages=ask("call"))
        thinking, use = done.content
        assert thinking.type == "thinking"
        assert thinking.thinking == "So it is."
        assert use.type == "tool_use"
        assert (use.name, use.input) == ("weather", {"city": "Zürich", "days": 3})
        assert done.stop_reason == "tool_use"
        result = [{"type": "text", "text": "script:hello"}, PICTURE]
        history: list[Any] = [
            *ask("call"),
            {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in done.content]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": result}]},
        ]
        # with thinking on, the prompt would open a thought for the model to go on with
        after = api.messages.create(**{**given, "thinking": {"type": "disabled"}}, messages=history)
        (text,) = after.content
        assert text.type == "text"
        assert text.text == "Hello there. What a day."


def test_a_stream_adds_up_to_the_whole(scripted: Server) -> None:
    with client(scripted) as api:
        for script in ("hello", "thought", "call", "calls", "emoji", "malformed"):
            given: Any = {"model": "scripted", "max_tokens": 200, "messages": ask(script), "tools": TOOLS}
            whole = api.messages.create(**given)
            with api.messages.stream(**given) as stream:
                kinds = [event.type for event in stream]
                streamed = stream.get_final_message()
            assert kinds[0] == "message_start"
            assert kinds[-1] == "message_stop"

            def plain(message: Any) -> list[dict[str, Any]]:
                return [
                    {k: v for k, v in block.model_dump(exclude_none=True).items() if k in KEPT}
                    for block in message.content
                ]

            assert plain(streamed) == plain(whole), script
            assert streamed.stop_reason == whole.stop_reason
            assert streamed.usage.output_tokens == whole.usage.output_tokens


KEPT = ("type", "text", "thinking", "name", "input")


def test_why_it_ended(scripted: Server) -> None:
    with client(scripted) as api:
        stop: list[str] = ["zzz", "a day", "Hello there. What a d"]
        done = api.messages.create(
            model="scripted", max_tokens=50, messages=ask("hello"), stop_sequences=stop
        )
        assert (done.stop_reason, done.stop_sequence) == ("stop_sequence", "Hello there. What a d")
        short = api.messages.create(model="scripted", max_tokens=3, messages=ask("hello"))
        assert short.stop_reason == "max_tokens"
        assert short.usage.output_tokens == 3


def test_from_asyncio(scripted: Server) -> None:
    async def texts() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=scripted.url, api_key="unused", max_retries=0) as api:

            async def one() -> str:
                given: Any = {"model": "scripted", "max_tokens": 50, "messages": ask("hello")}
                async with api.messages.stream(**given) as stream:
                    return "".join([text async for text in stream.text_stream])

            return await asyncio.gather(*[one() for _ in range(8)])

    assert asyncio.run(texts()) == ["Hello there. What a day."] * 8


def test_errors_have_anthropics_form(scripted: Server) -> None:
    with client(scripted) as api:
        with pytest.raises(anthropic.BadRequestError) as found:
            api.messages.create(
                model="scripted", max_tokens=5, messages=ask("hello"), extra_body={"temperature": -1}
            )
        body: Any = found.value.body
        assert body["type"] == "error"
        assert body["error"]["type"] == "invalid_request_error"
        with pytest.raises(anthropic.NotFoundError):
            api.messages.create(model="claude", max_tokens=5, messages=ask("hello"))
        url: Any = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:9/x.png"}}
        with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]|Fetching is off"):
            api.messages.create(
                model="scripted", max_tokens=5, system="x", messages=[{"role": "user", "content": [url]}]
            )
        given: Any = {"model": "scripted", "max_tokens": 50, "messages": ask("failing")}
        with pytest.raises(anthropic.APIError, match="not finite"), api.messages.stream(**given) as stream:
            list(stream)


@pytest.mark.parametrize(
    "wrong",
    [
        {"foo": 1},
        {"max_tokens": 0},
        {"max_tokens": None},
        {"messages": []},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}
            ]
        },
        {"messages": [{"role": "assistant", "content": [PICTURE]}]},
        {"tools": [{"name": "f"}]},
        {"tool_choice": {"type": "any"}},
        {"tool_choice": {"type": "tool", "name": "f"}, "tools": TOOLS},
        {
            "tool_choice": {"type": "tool", "name": "weather"},
            "tools": [{**TOOLS[0], "input_schema": {"not": {}}}],
        },
        {"thinking": {"type": "enabled"}},
        {"output_config": {"effort": "low"}},
        {"output_config": {"format": {"type": "json_schema"}}},
        {"stop_sequences": [""]},
        {"stop_sequences": ["x"] * 17},
    ],
    ids=str,
)
def test_what_is_refused(scripted: Server, wrong: dict[str, Any]) -> None:
    body = {"model": "scripted", "max_tokens": 5, "messages": ask("hello"), **wrong}
    reply = scripted.post("/v1/messages", body)
    assert reply.status == 400, reply.body
    assert set(reply.json) == {"type", "error"}
    assert reply.json["error"]["type"] == "invalid_request_error"
