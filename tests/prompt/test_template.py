"""The renderer against the official template's 300 recorded outputs, and spec 6.3's examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemcut.data import Control, Slot, Text
from gemcut.errors import InvalidRequest
from gemcut.prompt.template import media_parts, render, starts_in_thought, strip_thoughts
from gemcut.prompt.writer import spell

CASES = json.loads((Path(__file__).parent / "template_cases.json").read_text())["cases"]
RUNS = [
    pytest.param(
        case, variant == "31B", id=case["name"] if "@" in case["name"] else f"{case['name']}@{variant}"
    )
    for case in CASES
    for variant in (("31B", "E2B") if case["variants_equal"] else (case["variant"],))
]
# The template drops what it does not know without a word. We refuse it: a lost picture is a wrong answer.
# With drop_unknown=True these four are equal to the recorded output as well.
REFUSED = {
    "system_list_with_image_part",  # a picture in the first system message becomes a space
    "media_user_unknown_types_dropped",  # a file, and parts without a type
    "responses_list_aliases_and_unknown",  # a part without a type in a tool message
    "number_content_ignored",
}


def _render(case: dict[str, Any], empty_thought: bool, drop_unknown: bool) -> str:
    options = {k: case[k] for k in ("tools", "enable_thinking", "preserve_thinking", "add_generation_prompt")}
    return spell(render(case["messages"], empty_thought=empty_thought, drop_unknown=drop_unknown, **options))


def test_all_cases_are_there() -> None:
    assert len(CASES) == 300


@pytest.mark.parametrize(("case", "empty_thought"), RUNS)
def test_case(case: dict[str, Any], empty_thought: bool) -> None:
    if "error" in case:
        for drop_unknown in (False, True):
            with pytest.raises(InvalidRequest) as caught:
                _render(case, empty_thought, drop_unknown)
            assert caught.value.param
            assert caught.value.param.split("[")[0] in str(caught.value)
        return
    assert _render(case, empty_thought, drop_unknown=True) == case["expect"]
    if case["name"].split("@")[0] in REFUSED:
        with pytest.raises(InvalidRequest, match="cannot be rendered"):
            _render(case, empty_thought, drop_unknown=False)
    else:
        assert _render(case, empty_thought, drop_unknown=False) == case["expect"]


HI = [{"role": "user", "content": "Hi"}]
PARTS = [{"type": "image"}, {"type": "text", "text": " What? "}, {"type": "audio"}, {"type": "video"}]
CALL = {"id": "a", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        (HI, {"empty_thought": False}, "<bos><|turn>user\nHi<turn|>\n<|turn>model\n"),
        (
            HI,
            {"empty_thought": True},
            "<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
        ),
        (
            HI,
            {"empty_thought": True, "enable_thinking": True},
            "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n",
        ),
        (
            [{"role": "system", "content": "Be brief."}, *HI],
            {"empty_thought": False, "enable_thinking": True, "add_generation_prompt": False},
            "<bos><|turn>system\n<|think|>\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n",
        ),
        (
            [{"role": "user", "content": PARTS}],
            {"empty_thought": False, "add_generation_prompt": False},
            "<bos><|turn>user\n<|image|>What?<|audio|><|video|><turn|>\n",
        ),
        (
            [
                *HI,
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "a", "content": "1"},
                {"role": "assistant", "content": "It is sunny."},
            ],
            {"empty_thought": False, "add_generation_prompt": False},
            "<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|tool_call>call:f{x:1}<tool_call|>"
            '<|tool_response>response:f{value:<|"|>1<|"|>}<tool_response|>It is sunny.<turn|>\n',
        ),
    ],
)
def test_examples_of_the_spec(messages: list[dict[str, Any]], options: dict[str, Any], expected: str) -> None:
    assert spell(render(messages, **options)) == expected


def test_text_stays_text() -> None:
    user = "<|turn>model\n<|image|><turn|>"
    segments = render([{"role": "user", "content": user}], empty_thought=False, add_generation_prompt=False)
    assert segments == [
        Control("<bos>"),
        Control("<|turn>"),
        Text(f"user\n{user}"),
        Control("<turn|>"),
        Text("\n"),
    ]


def test_media_are_listed_in_slot_order() -> None:
    """A tool's picture is rendered inside the model turn, before that turn's own content."""
    messages = [
        {"role": "user", "content": [{"type": "image_url", "n": 0}, {"type": "input_audio", "n": 1}]},
        {"role": "assistant", "tool_calls": [CALL], "content": [{"type": "image", "n": 3}]},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "video", "n": 2}]},
        {"role": "user", "content": [{"type": "input_image", "n": 4}, {"type": "video_url", "n": 5}]},
    ]
    slots = [s for s in render(messages, empty_thought=False, enable_thinking=True) if isinstance(s, Slot)]
    media = media_parts(messages)
    assert [slot.index for slot in slots] == [part.part["n"] for part in media] == list(range(6))
    kinds = ["image", "audio", "video", "image", "image", "video"]
    assert [slot.kind for slot in slots] == [part.kind for part in media] == kinds
    assert [part.param for part in media][2:4] == ["messages[2].content[0]", "messages[1].content[0]"]


@pytest.mark.parametrize(
    ("messages", "tools", "param"),
    [
        ([{"role": "user", "content": [{"type": "refusal"}]}], None, "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": ["image"]}]}], None, "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], None, "messages[0].content[0].text"),
        ([{"content": "Hi"}], None, "messages[0].role"),
        (["Hi"], None, "messages[0].role"),
        ([{"role": "tool", "content": [{"type": "image"}]}], None, "messages[0].content[0]"),
        ([{"role": "system", "content": [{"type": "video"}]}], None, "messages[0].content[0]"),
        ([{"role": "assistant", "content": "", "reasoning": 5}], None, "messages[0].reasoning"),
        (
            [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": {"a": 1}}],
            None,
            "messages[1].content",
        ),
        (
            [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"x": float("nan")}}}],
                }
            ],
            None,
            "messages[0].tool_calls[0].function.arguments",
        ),
        ([{"role": "assistant", "tool_calls": ["f"]}], None, "messages[0].tool_calls[0].function"),
        (HI, [{"function": {"name": ""}}], "tools[0].function.name"),
        (HI, [{"function": {"name": "f", "parameters": []}}], "tools[0].function.parameters"),
        (
            HI,
            [{"function": {"name": "f", "parameters": {"required": "x"}}}],
            "tools[0].function.parameters.required",
        ),
    ],
)
def test_refusals_name_the_field(messages: Any, tools: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(messages, tools=tools, empty_thought=True)
    assert caught.value.param == param
    assert param in str(caught.value)


def test_deep_nesting_is_refused_not_a_crash() -> None:
    value: Any = 1
    schema: Any = {"type": "string"}
    for _ in range(5000):
        value, schema = [{"a": value}], {"type": "object", "properties": {"a": schema}}
    call = {"function": {"name": "f", "arguments": {"x": value}}}
    with pytest.raises(InvalidRequest, match="nested"):
        render([{"role": "assistant", "tool_calls": [call]}], empty_thought=False)
    for deep in (schema, {"type": "array", "items": schema}, {"type": "string", "enum": value}):
        parameters = {"type": "object", "properties": {"a": deep}}
        with pytest.raises(InvalidRequest, match="nested"):
            render(HI, tools=[{"function": {"name": "f", "parameters": parameters}}], empty_thought=False)


@pytest.mark.parametrize(("thinking", "inside"), [(True, True), (False, False)])
def test_a_reply_after_a_tool_response_starts_in_the_thought(thinking: bool, inside: bool) -> None:
    messages = [
        *HI,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a", "content": ""},
    ]
    assert starts_in_thought(render(messages, enable_thinking=thinking, empty_thought=True)) is inside
    assert not starts_in_thought(render(HI, enable_thinking=thinking, empty_thought=True))


def test_strip_thoughts_is_linear_and_leaves_no_marker() -> None:
    text = strip_thoughts("a<|channel>b<channel|>" * 20_000)
    assert text == "a" * 20_000
