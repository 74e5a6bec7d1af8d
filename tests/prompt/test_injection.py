"""Whatever a caller writes, the structure of the prompt is the one that the messages have."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_tokenizers import hostile

from gemcut.data import Control, Segment, Slot, Text
from gemcut.prompt.template import media_parts, render
from gemcut.prompt.tokenizer import Tokenizer

FAST = settings(derandomize=True, max_examples=200, deadline=None)

# A conversation is drawn with holes for text; the holes are filled twice, once with harmless letters.
HOLE = "\0hole"
part = st.one_of(
    st.just({"type": "text", "text": HOLE}),
    st.sampled_from(["image", "image_url", "audio"]).map(lambda kind: {"type": kind, kind: HOLE}),
)
content = st.one_of(st.just(HOLE), st.lists(part, max_size=4))
call = st.just(
    {"id": "a", "function": {"name": HOLE, "arguments": {"x": HOLE, "y": [HOLE, {"z": HOLE}], HOLE: 1}}}
)
message = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "developer", HOLE]), "content": content}
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": content},
        optional={"reasoning": st.just(HOLE), "tool_calls": st.lists(call, max_size=2)},
    ),
    st.fixed_dictionaries(
        {
            "role": st.just("tool"),
            "tool_call_id": st.sampled_from(["a", HOLE]),
            "name": st.just(HOLE),
            "content": content,
        }
    ),
)
tool = st.just(
    {
        "function": {
            "name": HOLE,
            "description": HOLE,
            "parameters": {
                "type": "object",
                "properties": {
                    HOLE: {"type": "string", "description": HOLE, "enum": [HOLE, HOLE]},
                    "l": {"type": "array", "items": {"type": HOLE, "title": HOLE}},
                    "o": {"type": "object", "properties": {"k": {"type": HOLE, "nullable": HOLE}}},
                },
                "required": [HOLE],
            },
            "response": {"type": "object", "description": HOLE},
        }
    }
)


def _fill(value: Any, text: Any) -> Any:
    """The value with every hole filled by the next `text()`. Keys keep their place in the order."""
    if value == HOLE:
        return f"x{text()}"
    if isinstance(value, list):
        return [_fill(item, text) for item in value]
    if isinstance(value, dict):
        return {f"a{text()}" if k == HOLE else k: _fill(v, text) for k, v in value.items()}
    return value


def _skeleton(segments: list[Segment]) -> list[Segment]:
    return [segment for segment in segments if not isinstance(segment, Text)]


@given(
    messages=st.lists(message, max_size=5),
    tools=st.lists(tool, max_size=1),
    thinking=st.booleans(),
    texts=st.lists(hostile, min_size=1, max_size=8),
    name=st.sampled_from(["byte-level", "gemma-like"]),
)
@FAST
def test_text_changes_no_structure(
    messages: list[Any],
    tools: list[Any],
    thinking: bool,
    texts: list[str],
    name: str,
    both: dict[str, Tokenizer],
) -> None:
    fills = [iter(texts * 500), iter([""] * 4000)]
    (evil, evil_tools), (plain, plain_tools) = (
        (_fill(messages, lambda f=fill: next(f)), _fill(tools, lambda f=fill: next(f))) for fill in fills
    )
    options = {"enable_thinking": thinking, "empty_thought": True, "drop_unknown": True}
    segments = render(evil, tools=evil_tools, **options)
    assert _skeleton(segments) == _skeleton(render(plain, tools=plain_tools, **options))

    tokenizer = both[name]
    slots = [segment for segment in segments if isinstance(segment, Slot)]
    sizes = [slot.index % 3 + 1 for slot in slots]
    prompt = tokenizer.encode(segments, sizes)
    assert [(span.kind, span.index) for span in prompt.spans] == [(s.kind, s.index) for s in slots]
    expected: list[int] = []
    for segment in _skeleton(segments):
        if isinstance(segment, Control):
            expected.append(tokenizer.control_id(segment.token))
        elif isinstance(segment, Slot):
            kind = segment.kind
            expected.append(tokenizer.control_id(f"<|{kind}>"))
            expected += [tokenizer.control_id(f"<|{kind}|>")] * sizes[segment.index]
            expected.append(tokenizer.control_id(f"<{kind}|>"))
    control_ids = set(tokenizer.controls.values())
    assert [i for i in prompt.token_ids if i in control_ids] == expected


@given(before=hostile, after=hostile)
@FAST
def test_text_moves_no_picture(before: str, after: str, both: dict[str, Tokenizer]) -> None:
    parts = [
        {"type": "text", "text": before},
        {"type": "image"},
        {"type": "text", "text": after},
        {"type": "image"},
    ]
    messages = [{"role": "user", "content": parts}]
    assert [medium.param for medium in media_parts(messages)] == [
        "messages[0].content[1]",
        "messages[0].content[3]",
    ]
    tokenizer = both["byte-level"]
    prompt = tokenizer.encode(render(messages, empty_thought=False), [2, 1])
    first, second = prompt.spans
    assert tokenizer.decode(prompt.token_ids[: first.start - 1]) == f"<bos><|turn>user\n{before.strip()}"
    assert tokenizer.decode(prompt.token_ids[first.stop + 1 : second.start - 1]) == after.strip()
