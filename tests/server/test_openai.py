"""OpenAI's own SDK as the client: the demo model for pictures and numbers, the scripted engine for forms."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from server_rig import DATA_URI, Server, until

from gemcut.demo import CHECKPOINT
from gemcut.engine.model_files import ModelFiles

QUESTION: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": DATA_URI}},
            {"type": "text", "text": "What does the sign say?"},
        ],
    }
]
WEATHER: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def ask(script: str) -> list[Any]:
    return [{"role": "user", "content": f"script:{script}"}]


# ---- the demo model


def test_a_picture_is_answered(demo: Server) -> None:
    with client(demo) as api:
        done = api.chat.completions.create(model="gemcut-demo", messages=QUESTION, temperature=0)
        assert done.choices[0].message.content == "GEMCUT"
        assert done.choices[0].finish_reason == "stop"
        assert done.usage is not None
        assert done.usage.prompt_tokens == 82
        assert done.usage.completion_tokens == 7
        assert done.usage.total_tokens == 89
        details: Any = done.usage.prompt_tokens_details
        assert details.image_tokens == 60
        again = api.chat.completions.create(model="gemcut-demo", messages=QUESTION, temperature=0)
        assert again.choices[0].message.content == "GEMCUT"
        assert again.usage is not None
        assert again.usage.prompt_tokens_details is not None
        assert again.usage.prompt_tokens_details.cached_tokens == 80


def test_a_stream_says_the_same(demo: Server) -> None:
    with client(demo) as api:
        chunks = list(
            api.chat.completions.create(
                model="gemcut-demo",
                messages=QUESTION,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "GEMCUT"
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_many_at_once_from_asyncio(demo: Server) -> None:
    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="unused", max_retries=0) as api:

            async def one(streamed: bool) -> str:
                given: Any = {"model": "gemcut-demo", "messages": QUESTION, "temperature": 0}
                if not streamed:
                    done = await api.chat.completions.create(**given)
                    return done.choices[0].message.content or ""
                stream = await api.chat.completions.create(**given, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*[one(i % 2 == 0) for i in range(12)])

    assert asyncio.run(all_of_them()) == ["GEMCUT"] * 12


def test_a_picture_takes_as_many_tokens_as_asked(scripted: Server) -> None:
    def prompt_tokens(*pictures: dict[str, Any], **extra: Any) -> int:
        content = [{"type": "image_url", "image_url": url} for url in pictures]
        body = {"messages": [{"role": "user", "content": [*content, {"type": "text", "text": "x"}]}], **extra}
        reply = scripted.post("/tokenize", body)
        assert reply.status == 200, reply.body
        return reply.json["count"]

    url, without = {"url": DATA_URI}, prompt_tokens()

    def image_tokens(*pictures: dict[str, Any], **extra: Any) -> int:
        return prompt_tokens(*pictures, **extra) - without - 2 * len(pictures)  # each has its brackets

    def budget(tokens: int) -> dict[str, Any]:
        return {"mm_processor_kwargs": {"max_soft_tokens": tokens}}

    small, large = image_tokens(url, **budget(70)), image_tokens(url, **budget(1120))
    assert small == 60 == image_tokens({**url, "detail": "low"})
    assert large > 1000
    assert image_tokens({**url, "detail": "high"}) == large
    assert image_tokens({**url, "detail": "auto"}) == image_tokens(url)
    # a picture's own detail goes before the request's budget
    assert image_tokens({**url, "detail": "low"}, url, **budget(1120)) == small + large


def test_log_probabilities(demo: Server) -> None:
    with client(demo) as api:
        done = api.chat.completions.create(
            model="gemcut-demo", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3
        )
        logprobs = done.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        first = logprobs.content[0]
        assert "".join(entry.token for entry in logprobs.content[:-1]) == "GEMCUT"
        assert first.bytes == list(first.token.encode())
        assert first.top_logprobs[0].token == first.token
        assert len(first.top_logprobs) == 3
        assert first.logprob == first.top_logprobs[0].logprob
        assert math.exp(first.logprob) > 0.9
        plain = api.completions.create(
            model="gemcut-demo", prompt="the red", max_tokens=3, logprobs=2, temperature=0
        )
        found = plain.choices[0].logprobs
        assert found is not None
        assert found.tokens is not None
        assert found.text_offset is not None
        assert found.top_logprobs is not None
        assert len(found.tokens) == len(found.text_offset) == len(found.top_logprobs) == 3
        assert found.text_offset[1] == len(found.tokens[0])


def test_a_seed_draws_the_same_again(demo: Server) -> None:
    def drawn(seed: int) -> list[str]:
        body = {
            "prompt": "What color",
            "max_tokens": 12,
            "temperature": 1.5,
            "n": 3,
            "seed": seed,
            "ignore_eos": True,
        }
        choices = demo.post("/v1/completions", {**body, "return_token_ids": True}).json["choices"]
        return [str(choice["token_ids"]) for choice in choices]

    assert drawn(7) == drawn(7)
    assert len(set(drawn(7))) == 3
    assert drawn(7) != drawn(8)


def test_the_first_form_finds_the_vocabulary_read() -> None:
    """With Gemma's 262,144 tokens that takes seconds."""
    with Server.demo() as server:
        threads = Path(f"/proc/{server.engine_pid}/task")

        def trying() -> bool:
            children = [pid for at in threads.glob("*/children") for pid in at.read_text().split()]
            names = [Path(f"/proc/{pid}/cmdline").read_text() for pid in children]
            return any("gemcut.prompt.grammar_main" in name for name in names)

        until(trying, 10.0, server.log)


def test_a_schema_rules_the_answer(demo: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}},
        "required": ["color", "sure"],
        "additionalProperties": False,
    }
    with client(demo) as api:
        form: Any = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        }
        done = api.chat.completions.create(
            model="gemcut-demo", messages=QUESTION, response_format=form, max_tokens=1000, temperature=0
        )
    answer = json.loads(done.choices[0].message.content or "")
    assert set(answer) == {"color", "sure"}
    assert answer["color"] in ("red", "blue")


def test_a_schema_that_cannot_be_compiled_is_named(demo: Server) -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "(("}},
    }
    for stream in (False, True):
        reply = demo.post(
            "/v1/chat/completions", {"messages": QUESTION, "response_format": form, "stream": stream}
        )
        assert reply.status == 400
        assert reply.error["param"] == "response_format"


LIGHTS: list[Any] = [
    {"type": "function", "function": {"name": "all_off"}},
    {
        "type": "function",
        "function": {
            "name": "set_light",
            "parameters": {
                "type": "object",
                "properties": {
                    "room": {"enum": ["hall", "kitchen", 'the "lab"']},
                    "level": {"type": "integer", "minimum": 0, "maximum": 100},
                    "label": {"type": "string", "maxLength": 4},
                },
                "required": ["room", "level"],
            },
        },
    },
]


def fits(call: Any) -> bool:
    """Whether a call, in any interface's shape, is of one of LIGHTS and as its schema says."""
    arguments = json.loads(call.function.arguments)
    if call.function.name == "all_off":
        return arguments == {}
    jsonschema.validate(arguments, LIGHTS[1]["function"]["parameters"])
    return call.function.name == "set_light"


def test_a_call_is_forced_on_a_model_that_has_never_seen_one(demo: Server) -> None:
    named: Any = {"type": "function", "function": {"name": "set_light"}}
    with client(demo) as api:
        given: Any = {"model": "gemcut-demo", "messages": QUESTION, "tools": LIGHTS, "max_tokens": 300}
        for seed in range(4):
            done = api.chat.completions.create(
                **given, tool_choice="required", parallel_tool_calls=False, seed=seed, temperature=2
            )
            (call,) = done.choices[0].message.tool_calls or ()
            assert fits(call)
            assert done.choices[0].finish_reason == "tool_calls"
            assert not done.choices[0].message.content
        done = api.chat.completions.create(
            **given, tool_choice=named, n=3, seed=1, temperature=2, parallel_tool_calls=False
        )
        calls: list[Any] = [call for choice in done.choices for call in choice.message.tool_calls or ()]
        assert len(calls) == 3
        assert all(fits(call) and call.function.name == "set_light" for call in calls)
        pieces: list[Any] = []
        for chunk in api.chat.completions.create(
            **given, tool_choice=named, stream=True, seed=3, parallel_tool_calls=False
        ):
            pieces += chunk.choices[0].delta.tool_calls or ()
            reason = chunk.choices[0].finish_reason
        assert {piece.index for piece in pieces} == {0}
        assert "".join(piece.function.name or "" for piece in pieces) == "set_light"
        room = json.loads("".join(piece.function.arguments or "" for piece in pieces))["room"]
        assert room in ("hall", "kitchen", 'the "lab"')
        assert reason == "tool_calls"


def test_a_thought_has_a_budget_and_the_call_follows(demo: Server) -> None:
    """The model is pushed to think, and not to stop."""
    tokenizer = ModelFiles.open(CHECKPOINT).tokenizer
    opening, closing = tokenizer.control_id("<|channel>"), tokenizer.control_id("<channel|>")
    given: dict[str, Any] = {
        "messages": QUESTION,
        "tools": LIGHTS,
        "reasoning_effort": "high",
        "thinking_token_budget": 8,
        "logit_bias": {str(opening): 100, str(closing): -100},
        "parallel_tool_calls": False,
        "max_tokens": 200,
        "temperature": 2,
    }
    for seed in range(3):
        called = demo.post("/v1/chat/completions", {**given, "tool_choice": "required", "seed": seed}).json
        (choice,) = called["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] in ("all_off", "set_light")
        assert called["usage"]["completion_tokens_details"]["reasoning_tokens"] == 10  # with both its ends
    free = {key: value for key, value in given.items() if key not in ("tools", "parallel_tool_calls")}
    done = demo.post("/v1/chat/completions", {**free, "max_tokens": 20, "return_token_ids": True}).json
    (choice,) = done["choices"]
    assert choice["message"]["reasoning"]
    # pushed to think again at once, it has nothing left to think with
    first, rest = choice["token_ids"][:10], choice["token_ids"][10:12]
    assert (first[0], first[-1]) == (opening, closing)
    assert rest == [opening, closing]


def test_a_model_that_may_call_answers_in_its_form_otherwise(demo: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    strict: list[Any] = [
        {"type": "function", "function": {**light["function"], "strict": True}} for light in LIGHTS
    ]
    with client(demo) as api:
        done = api.chat.completions.create(
            model="gemcut-demo", messages=QUESTION, tools=strict, response_format=form, temperature=0
        )
    message = done.choices[0].message
    assert all(fits(call) for call in message.tool_calls or ())
    assert message.tool_calls or json.loads(message.content or "")["a"] in (1, 2)


@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            "is none of the tools",
        ),
        (
            {"tools": WEATHER, "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            "names 'f', which is none of the tools",
        ),
        (
            {"tools": WEATHER, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
            "no room for a form",
        ),
        ({"tools": WEATHER, "structured_outputs": {"regex": "a"}}, "structured_outputs.regex", "regex"),
        (
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
            },
            "tools[0].function.parameters",
            "'not'",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"properties": {"a": {"pattern": "(("}}}},
                    }
                ],
            },
            "tools",
            "cannot be used",
        ),
    ],
    ids=str,
)
def test_calls_that_cannot_be_forced(scripted: Server, wrong: dict[str, Any], param: str, words: str) -> None:
    reply = scripted.chat("hello", **wrong)
    assert reply.status == 400
    assert reply.error["param"] == param
    assert words in reply.error["message"]


# ---- forms, from scripted replies


def test_reasoning_has_its_own_field(scripted: Server) -> None:
    with client(scripted) as api:
        done = api.chat.completions.create(model="scripted", messages=ask("thought"), reasoning_effort="high")
        message: Any = done.choices[0].message
        assert (message.content, message.reasoning, message.reasoning_content) == (
            "Yes.",
            "So it is.",
            "So it is.",
        )
        assert done.usage is not None
        assert done.usage.completion_tokens_details is not None
        assert done.usage.completion_tokens_details.reasoning_tokens == 10
        deltas: list[Any] = [
            chunk.choices[0].delta
            for chunk in api.chat.completions.create(model="scripted", messages=ask("thought"), stream=True)
        ]
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == "So it is."
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "So it is."
    assert "".join(delta.content or "" for delta in deltas) == "Yes."


def test_a_call_and_its_answer(scripted: Server) -> None:
    with client(scripted) as api:
        done = api.chat.completions.create(model="scripted", messages=ask("call"), tools=WEATHER)
        message = done.choices[0].message
        assert done.choices[0].finish_reason == "tool_calls"
        assert message.content is None
        assert message.tool_calls is not None
        (call,) = message.tool_calls
        assert call.type == "function"
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Zürich", "days": 3}
        # the SDK's own dump of the message goes back as it is
        history = [
            *ask("call"),
            message.model_dump(),
            {"role": "tool", "tool_call_id": call.id, "content": "script:hello and sunny"},
        ]
        after = api.chat.completions.create(model="scripted", messages=history, tools=WEATHER)
        assert after.choices[0].message.content == "Hello there. What a day."


def test_a_streamed_call_is_valid_json_at_any_time(scripted: Server) -> None:
    with client(scripted) as api:
        arguments: dict[int, str] = {}
        names, reasons = {}, []
        for chunk in api.chat.completions.create(
            model="scripted", messages=ask("calls"), tools=WEATHER, stream=True
        ):
            for call in chunk.choices[0].delta.tool_calls or ():
                assert call.function is not None
                arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
                names[call.index] = call.function.name
                json.loads(arguments[call.index])
            reasons.append(chunk.choices[0].finish_reason)
            assert '<|"|>' not in str(chunk)
    assert names == {0: "weather", 1: "time"}
    assert json.loads(arguments[0]) == {"city": "Zürich", "days": 3}
    assert reasons[-1] == "tool_calls"


def test_one_call_only_if_calls_may_not_be_parallel(scripted: Server) -> None:
    with client(scripted) as api:
        done = api.chat.completions.create(
            model="scripted", messages=ask("calls"), tools=WEATHER, parallel_tool_calls=False
        )
    assert len(done.choices[0].message.tool_calls or ()) == 1
    assert done.choices[0].finish_reason == "tool_calls"


def test_a_call_that_cannot_be_read_is_not_lost(scripted: Server) -> None:
    whole = scripted.chat("malformed").json["choices"][0]
    assert whole["message"]["content"] == "Wait."
    assert whole["message"]["malformed_tool_calls"] == ["call:weather{city"]
    assert "tool_calls" not in whole["message"]
    events = scripted.chat("malformed", stream=True).events()
    assert [
        e["choices"][0]["delta"]["malformed_tool_calls"] for e in events[:-1] if "malformed" in str(e)
    ] == [["call:weather{city"]]


def test_tool_choice_none_hides_the_tools(scripted: Server) -> None:
    def prompt_tokens(**fields: Any) -> int:
        return scripted.chat("hello", **fields).json["usage"]["prompt_tokens"]

    assert prompt_tokens(tools=WEATHER) > prompt_tokens()
    assert prompt_tokens(tools=WEATHER, tool_choice="none") == prompt_tokens()


def test_stop_strings_and_lengths(scripted: Server) -> None:
    with client(scripted) as api:
        done = api.chat.completions.create(model="scripted", messages=ask("hello"), stop=["a day", "zzz"])
        assert done.choices[0].message.content == "Hello there. What "
        assert done.choices[0].finish_reason == "stop"
        stream = api.chat.completions.create(
            model="scripted", messages=ask("hello"), stop="re. W", stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello the"
        short = api.chat.completions.create(model="scripted", messages=ask("long"), max_completion_tokens=5)
        assert short.choices[0].finish_reason == "length"
        assert short.usage is not None
        assert short.usage.completion_tokens == 5


def test_several_answers_and_prompts(scripted: Server) -> None:
    with client(scripted) as api:
        done = api.chat.completions.create(model="scripted", messages=ask("hello"), n=3)
        assert [c.index for c in done.choices] == [0, 1, 2]
        assert {c.message.content for c in done.choices} == {"Hello there. What a day."}
        texts: dict[int, str] = {}
        ends = []
        prompts = ["script:hello", "script:emoji"]
        for chunk in api.completions.create(model="scripted", prompt=prompts, n=2, stream=True):
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                ends += [choice.index] * (choice.finish_reason is not None)
    hello, emoji = "Hello there. What a day.", "naïve 漢字 🙂"
    assert texts == {0: hello, 1: hello, 2: emoji, 3: emoji}
    assert sorted(ends) == [0, 1, 2, 3]


def test_an_infinite_logprob_is_a_number(scripted: Server) -> None:
    entries = scripted.chat("hello", logprobs=True).json["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries[:2]] == [-0.5, -9999.0]


def test_bytes_of_tokens_add_up_to_the_text(scripted: Server) -> None:
    """Also where a character takes several tokens."""
    choice = scripted.chat("emoji", logprobs=True).json["choices"][0]
    entries = choice["logprobs"]["content"][:-1]  # without the end of the turn
    assert any("\ufffd" in entry["token"] for entry in entries)
    assert bytes(b for entry in entries for b in entry["bytes"]).decode() == choice["message"]["content"]


def test_models(scripted: Server) -> None:
    with client(scripted) as api:
        assert [model.id for model in api.models.list()] == ["scripted"]
        assert api.models.retrieve("scripted").owned_by == "gemcut"
        with pytest.raises(openai.NotFoundError) as found:
            api.models.retrieve("gpt-5")
        assert found.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            api.chat.completions.create(model="gpt-5", messages=ask("hello"))


def test_tokens_there_and_back(scripted: Server) -> None:
    told = scripted.post("/tokenize", {"prompt": "naïve 🙂 <|turn>", "return_token_strs": True}).json
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["tokens"][0] == 2
    assert scripted.post("/detokenize", {"tokens": told["tokens"][1:]}).json == {"prompt": "naïve 🙂 <|turn>"}
    bare = scripted.post("/tokenize", {"prompt": "naïve 🙂 <|turn>", "add_special_tokens": False}).json
    assert bare["tokens"] == told["tokens"][1:]
    chat = scripted.post("/tokenize", {"messages": ask("hello")}).json
    assert chat["count"] == scripted.chat("hello").json["usage"]["prompt_tokens"]


def test_the_sdk_reads_our_errors(scripted: Server) -> None:
    with client(scripted) as api:
        with pytest.raises(openai.BadRequestError) as found:
            api.chat.completions.create(model="scripted", messages=ask("hello"), temperature=-1)
        assert found.value.param == "temperature"
        assert found.value.request_id is not None
        with pytest.raises(openai.InternalServerError) as failed:
            api.chat.completions.create(model="scripted", messages=ask("failing"))
        assert "not finite" in failed.value.message
        stream = api.chat.completions.create(model="scripted", messages=ask("failing"), stream=True)
        with pytest.raises(openai.APIError, match="not finite"):
            list(stream)
