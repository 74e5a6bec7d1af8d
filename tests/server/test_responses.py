"""OpenAI's Responses interface, with OpenAI's own SDK as the client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pydantic
import pytest
from server_rig import DATA_URI, Server

PICTURE = {"type": "input_image", "image_url": DATA_URI, "detail": "auto"}
QUESTION: list[Any] = [
    {"role": "user", "content": [PICTURE, {"type": "input_text", "text": "What does the sign say?"}]}
]
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Bern", "Zürich"]}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city"],
    },
    "strict": True,
}
SCRIPTS = ("hello", "thought", "call", "calls", "emoji", "malformed")


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def plain(response: Any) -> list[dict[str, Any]]:
    """A response's items without what differs from one to the next."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: kept(v) for k, v in value.items() if k not in ("id", "call_id") and v is not None}
        return [kept(v) for v in value] if isinstance(value, list) else value

    return kept([item.model_dump() for item in response.output])


# ---- the demo model


def test_a_picture_is_answered(demo: Server) -> None:
    with client(demo) as api:
        done = api.responses.create(model="gemcut-demo", input=QUESTION, temperature=0)
        again = api.responses.create(model="gemcut-demo", input=QUESTION, temperature=0)
    assert done.output_text == "GEMCUT"
    assert (done.status, done.error, done.incomplete_details) == ("completed", None, None)
    assert (done.store, done.temperature, done.tool_choice) == (False, 0, "auto")
    assert done.usage is not None
    assert (done.usage.input_tokens, done.usage.output_tokens, done.usage.total_tokens) == (82, 7, 89)
    details: Any = done.usage.input_tokens_details
    assert details.image_tokens == 60
    assert again.usage is not None
    assert again.usage.input_tokens_details.cached_tokens == 80


def test_from_asyncio_streamed_and_not(demo: Server) -> None:
    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="unused", max_retries=0) as api:

            async def one(streamed: bool) -> str:
                given: Any = {"model": "gemcut-demo", "input": QUESTION, "temperature": 0}
                if not streamed:
                    return (await api.responses.create(**given)).output_text
                events = [event async for event in await api.responses.create(**given, stream=True)]
                return "".join(event.delta for event in events if event.type == "response.output_text.delta")

            return await asyncio.gather(*[one(i % 2 == 0) for i in range(8)])

    assert asyncio.run(all_of_them()) == ["GEMCUT"] * 8


def test_a_call_is_forced(demo: Server) -> None:
    with client(demo) as api:
        given: Any = {"model": "gemcut-demo", "input": "Hi", "tools": [WEATHER], "parallel_tool_calls": False}
        choices: list[Any] = [
            "required",
            {"type": "function", "name": "weather"},
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]},
        ]
        for choice in choices:
            done = api.responses.create(**given, tool_choice=choice, max_output_tokens=200)
            (item,) = done.output
            assert item.type == "function_call"
            assert item.name == "weather"
            arguments = json.loads(item.arguments)
            assert arguments["city"] in ("Bern", "Zürich")
            assert arguments.get("days", 0) <= 9


def test_a_schema_rules_the_answer(demo: Server) -> None:
    class Answer(pydantic.BaseModel):
        sure: bool

    with client(demo) as api:
        done = api.responses.parse(
            model="gemcut-demo", input=QUESTION, text_format=Answer, temperature=0, max_output_tokens=500
        )
    assert isinstance(done.output_parsed, Answer)


# ---- forms, from scripted replies


def test_a_stream_adds_up_to_the_whole(scripted: Server) -> None:
    with client(scripted) as api:
        for script in SCRIPTS:
            given: Any = {"model": "scripted", "input": f"script:{script}", "max_output_tokens": 200}
            whole = api.responses.create(**given)
            with api.responses.stream(**given) as stream:  # the SDK adds the events up by itself
                events = list(stream)
                streamed = stream.get_final_response()
            assert plain(streamed) == plain(whole), script
            assert streamed.output_text == whole.output_text
            assert streamed.status == whole.status == "completed"
            assert streamed.usage is not None
            assert whole.usage is not None
            assert streamed.usage.total_tokens == whole.usage.total_tokens
            assert [event.sequence_number for event in events] == list(range(len(events)))


def test_events_come_in_their_order(scripted: Server) -> None:
    body = {"input": "script:call", "stream": True}
    reply = scripted.post("/v1/responses", body)
    names = [line[7:] for line in reply.body.decode().split("\n") if line.startswith("event: ")]
    events = reply.events()
    assert names == [event["type"] for event in events]
    shown = [name.removeprefix("response.") for name in names]
    deltas = [name for name in shown if name == "reasoning_text.delta"]
    assert shown == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", *deltas),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "completed"),
    ]
    assert [event["output_index"] for event in events if event["type"].endswith("output_item.added")] == [
        0,
        1,
    ]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[-1]["response"]["output"] == [
        event["item"] for event in events if event["type"].endswith("output_item.done")
    ]
    said = {event["type"].removeprefix("response."): event for event in events}
    assert json.loads(said["function_call_arguments.delta"]["delta"]) == {"city": "Zürich", "days": 3}
    assert said["reasoning_text.done"]["text"] == "So it is."


def test_a_call_and_its_answer(scripted: Server) -> None:
    given: Any = {
        "model": "scripted",
        "tools": [{**WEATHER, "strict": False}],
        "instructions": "Be brief.",
        "reasoning": {"effort": "high"},
    }
    with client(scripted) as api:
        history: Any = [{"role": "user", "content": "script:call"}]
        done = api.responses.create(**given, input=history)
        thought, call = done.output
        assert thought.type == "reasoning"
        assert [part.text for part in thought.content or ()] == ["So it is."]
        assert call.type == "function_call"
        assert json.loads(call.arguments) == {"city": "Zürich", "days": 3}
        assert done.usage is not None
        assert done.usage.output_tokens_details.reasoning_tokens == 10
        # what came back goes in again as it is
        history += done.output
        output: Any = [{"type": "input_text", "text": "script:hello and sunny"}, PICTURE]
        history.append({"type": "function_call_output", "call_id": call.call_id, "output": output})
        after = api.responses.create(**{**given, "reasoning": {"effort": "none"}}, input=history)
        assert after.output_text == "Hello there. What a day."
        history += [*after.output, {"role": "user", "content": "script:emoji"}]
        assert api.responses.create(**given, input=history).output_text == "naïve 漢字 🙂"


def test_items_become_the_conversation_that_chat_would_have(scripted: Server) -> None:
    """By the number of their tokens, which is the prompt's in both interfaces."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bern"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "script:hello"}]},
        {"role": "assistant", "content": "", "reasoning": "Hm.", "tool_calls": [call, {**call, "id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c2", "content": "rainy"},
        {"role": "assistant", "content": "Sunny."},
        {"role": "developer", "content": "In rhymes."},
    ]
    made = {"type": "function_call", "name": "weather", "arguments": '{"city":"Bern"}'}
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "script:hello"}]},
        {
            "type": "reasoning",
            "id": "r",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm."}],
        },
        {**made, "call_id": "c1"},
        {**made, "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": "rainy"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Sunny.", "annotations": []}]},
        {"type": "message", "role": "developer", "content": "In rhymes."},
    ]
    chat = scripted.post("/v1/chat/completions", {"messages": messages}).json
    response = scripted.post("/v1/responses", {"input": items, "instructions": "Be brief."}).json
    assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    again = scripted.post("/v1/responses", {"input": items, "instructions": "Be brief."}).json
    # the same prompt to the last token: all whole pages of it are found
    assert again["usage"]["input_tokens_details"]["cached_tokens"] >= chat["usage"]["prompt_tokens"] - 16


def test_why_it_ended(scripted: Server) -> None:
    with client(scripted) as api:
        short = api.responses.create(model="scripted", input="script:hello", max_output_tokens=3)
        assert short.status == "incomplete"
        assert short.incomplete_details is not None
        assert short.incomplete_details.reason == "max_output_tokens"
        assert short.output[-1].status == "incomplete"  # type: ignore[union-attr]
        events = list(
            api.responses.create(model="scripted", input="script:hello", max_output_tokens=3, stream=True)
        )
        assert events[-1].type == "response.incomplete"


def test_errors(scripted: Server) -> None:
    with client(scripted) as api:
        with pytest.raises(openai.BadRequestError) as found:
            api.responses.create(model="scripted", input="x", temperature=-1)
        assert found.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            api.responses.create(model="gpt-5", input="x")
        with pytest.raises(openai.InternalServerError, match="not finite"):
            api.responses.create(model="scripted", input="script:failing")
        events: list[Any] = list(api.responses.create(model="scripted", input="script:failing", stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[-1].type == "response.failed"
        assert events[-1].response.status == "failed"
        assert "not finite" in events[-1].response.error.message


CALL: dict[str, Any] = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
OUTPUT: dict[str, Any] = {"type": "function_call_output", "call_id": "c", "output": "x"}
THOUGHT: dict[str, Any] = {
    "type": "reasoning",
    "id": "r",
    "summary": [{"type": "summary_text", "text": "Hm."}],
}
USER: dict[str, Any] = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "strin"}}}},
            "text.format",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{**WEATHER, "parameters": {"not": {}}}]}, "tools[0].parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [USER, {"role": "user", "content": [{"type": "input_file"}]}]}, "input[1].content[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [USER, OUTPUT]}, "input[1].call_id"),
        ({"input": [CALL, {"role": "assistant", "content": "x"}, OUTPUT]}, "input[2].call_id"),
        ({"input": [CALL, OUTPUT, OUTPUT]}, "input[2].call_id"),
        ({"input": [{**CALL, "arguments": "["}]}, "input[0].arguments"),
        ({"input": [THOUGHT, USER]}, "input[1]"),
        ({"input": [USER, THOUGHT]}, "input"),
        (
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}
                ]
            },
            "input[0].content[0]",
        ),
    ],
    ids=str,
)
def test_what_is_refused(scripted: Server, wrong: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        reply = scripted.post("/v1/responses", {"input": "script:hello", "stream": stream, **wrong})
        if "stream_options" in wrong and stream:
            continue
        assert reply.status == 400, reply.body
        assert (reply.error["param"] or "").startswith(param), reply.error
