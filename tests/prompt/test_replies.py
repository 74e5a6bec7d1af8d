"""Replies: reasoning, calls, text; the same from any split of the stream."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_tokenizers import SPECIALS

from gemcut.data import Control, Slot, Text
from gemcut.prompt.replies import (
    CallFinished,
    CallMalformed,
    CallStarted,
    ReasoningDelta,
    Reply,
    ReplyParser,
    TextDelta,
    collect,
    parse,
)
from gemcut.prompt.template import render
from gemcut.prompt.tokenizer import Tokenizer
from gemcut.prompt.tools import write_members
from gemcut.prompt.writer import SegmentWriter

FAST = settings(derandomize=True, max_examples=200, deadline=None)
Piece = Text | Control


def pieces(spelled: str) -> list[Piece]:
    """Pieces of a spelled reply. Spellings become control tokens."""
    found: list[Piece] = []
    text = ""
    while spelled:
        token = next((s for s in SPECIALS if spelled.startswith(s)), None)
        if token is None:
            text, spelled = text + spelled[0], spelled[1:]
            continue
        found += [Text(text)] if text else []
        found.append(Control(token))
        text, spelled = "", spelled[len(token) :]
    return [*found, Text(text)] if text else found


def arguments(call: str) -> Any:
    reply = parse(pieces(f"<|tool_call>call:f{call}<tool_call|>"))
    assert not reply.text
    return reply.tool_calls[0].arguments if reply.tool_calls else reply.malformed_calls[0].reason


@pytest.mark.parametrize(
    ("spelled", "reply"),
    [
        ("Hello.<turn|>", Reply("Hello.")),
        ("<|channel>thought\nLet me see.\n<channel|>Hello.<turn|>", Reply("Hello.", "Let me see.")),
        ("<|channel>thought\n<channel|>Hello.<eos>", Reply("Hello.")),
        ("<|channel>thought<channel|>Hello.", Reply("Hello.")),
        ("<|channel>thought\na\n\n<channel|>b", Reply("b", "a\n")),
        ("<|channel>thought\nno end\n", Reply("", "no end\n")),
        ("<|channel>thought\nno end<turn|>", Reply("", "no end")),
        ("<|channel>thou", Reply()),
        ("<|channel>other\nx<channel|>y", Reply("y", "other\nx")),
        ("a<|channel>thought\nb\n<channel|>c", Reply("ac", "b")),
        ('a<channel|>b<|"|>c<pad>', Reply("abc")),
        ("", Reply()),
    ],
)
def test_text_and_reasoning(spelled: str, reply: Reply) -> None:
    assert parse(pieces(spelled)) == reply


def test_a_reply_that_starts_in_the_thought() -> None:
    assert parse(pieces("so\n<channel|>Hi"), starts_in_thought=True) == Reply("Hi", "so")
    assert parse(pieces("never closed"), starts_in_thought=True) == Reply("", "never closed")
    assert parse(pieces("<channel|>Hi"), starts_in_thought=True) == Reply("Hi")


def test_calls() -> None:
    spelled = (
        '<|channel>thought\nhm\n<channel|>Wait.<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}'
        "<tool_call|><|tool_call>call:now{}<tool_call|><|tool_response>"
    )
    assert parse(pieces(spelled)) == Reply(
        "Wait.",
        "hm",
        (CallFinished(0, "get_weather", {"city": "Paris", "days": 3}), CallFinished(1, "now", {})),
    )


def test_events_of_a_stream() -> None:
    parser = ReplyParser()
    stream = pieces("<|channel>thought\nhm\n<channel|>Hi<|tool_call>call:f{a:1}<tool_call|><|tool_response>")
    letters = [p for piece in stream for p in (map(Text, piece.text) if isinstance(piece, Text) else [piece])]
    events = [event for piece in letters for event in parser.push(piece)] + parser.finish()
    assert events == [
        ReasoningDelta("h"),
        ReasoningDelta("m"),
        TextDelta("H"),
        TextDelta("i"),
        CallStarted(0, "f"),
        CallFinished(0, "f", {"a": 1}),
    ]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("{}", {}),
        ("{ }", {}),
        ("{a:true,b:false,c:null}", {"a": True, "b": False, "c": None}),
        ("{a:1, b:-7,\n c: 0}", {"a": 1, "b": -7, "c": 0}),
        (
            "{a:1.5,b:-0.25,c:1e3,d:2.5E-7,e:1e+20,f:1.0}",
            {"a": 1.5, "b": -0.25, "c": 1e3, "d": 2.5e-7, "e": 1e20, "f": 1.0},
        ),
        ("{a:9007199254740993}", {"a": 9007199254740993}),
        (
            "{a:007,b:1.2.3,c:1e999,d:nan,e:+5,f:yes please}",
            {"a": "007", "b": "1.2.3", "c": "1e999", "d": "nan", "e": "+5", "f": "yes please"},
        ),
        ('{a:<|"|>1<|"|>,b:<|"|>null<|"|>,c:<|"|><|"|>}', {"a": "1", "b": "null", "c": ""}),
        ('{a:<|"|> x, }]:{ \n<|"|>}', {"a": " x, }]:{ \n"}),
        ("{a:[],b:[1,[2,null],{c:[true]}]}", {"a": [], "b": [1, [2, None], {"c": [True]}]}),
        ('{a:[<|"|>]<|"|>,<|"|>,<|"|>]}', {"a": ["]", ","]}),
        ('{o:{p:{q:<|"|>}<|"|>}},r:1}', {"o": {"p": {"q": "}"}}, "r": 1}),
        ('{<|"|>a b<|"|>:1,c d:2}', {"a b": 1, "c d": 2}),
        ("{a:1,}", {"a": 1}),
        ("{a:http://x.y/z}", {"a": "http://x.y/z"}),
        ('{a:<|"|><|image|><|"|>}', {"a": "<|image|>"}),
    ],
)
def test_arguments(call: str, expected: dict[str, Any]) -> None:
    got = arguments(call)
    assert got == expected
    assert [type(v) for v in got.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("{a:1", "no closing }"),
        ("{a:[1}", "found '}'"),
        ("{a}", "no colon"),
        ("{a:}", "has no value"),
        ("{a:1,,b:2}", "no colon"),
        ("{a:1}x", "follows the arguments"),
        ("{a:1}}", "follows the arguments"),
        ("{a:1,a:2}", "twice"),
        ('{a:<|"|>x}', "no closing <|"),
        ('{a:x<|"|>y<|"|>}', "expected a comma"),
        ("{a:<|image|>}", "<|image|> stands outside"),
        ("", "never start"),
        ("{a:" + "[" * 5000, "nested"),
        ("{a:" * 5000, "nested"),
    ],
)
def test_malformed_arguments(call: str, reason: str) -> None:
    assert reason in arguments(call)


@pytest.mark.parametrize(
    "end", ["", "<turn|>", "<eos>", "<|tool_response>", "<|tool_call>call:g{}<tool_call|>"]
)
def test_a_call_without_its_end_is_reported(end: str) -> None:
    cut = parse(pieces('x<|tool_call>call:f{a:<|"|>b' + end))
    assert cut.text == "x"
    assert cut.malformed_calls[0] == CallMalformed(0, "f", 'call:f{a:<|"|>b', 'a string has no closing <|"|>')
    assert parse(pieces("<|tool_call>call:f{a:1}" + end)).tool_calls[0] == CallFinished(0, "f", {"a": 1})


@pytest.mark.parametrize("raw", ["f{}", "call:{}", "call:", "", '{"name": "f"}', 'call:<|"|>f<|"|>{}'])
def test_a_call_without_a_name_is_reported(raw: str) -> None:
    parser = ReplyParser()
    events = [e for p in pieces(f"<|tool_call>{raw}<tool_call|>after") for e in parser.push(p)]
    assert isinstance(events[0], CallMalformed)
    assert (events[0].raw, events[0].name) == (raw, None)
    assert events[1:] == [TextDelta("after")]


def test_a_call_inside_a_thought_is_a_call() -> None:
    reply = parse(pieces("<|channel>thought\nI call it<|tool_call>call:f{}<tool_call|>then"))
    assert reply == Reply("then", "I call it", (CallFinished(0, "f", {}),))


# no control tokens in the letters: these come from the detokenizer as text whatever they spell
words = st.one_of(
    st.sampled_from(
        ["thought\n", "thought", "\n", "call:", "f", "{", "}", "[", "]", ",", ":", "1", "-2.5", "null"]
    ),
    st.sampled_from(["<|channel>", "<tool_call|>", '<|"|>', "call:f{", "a:1", " "]),
    st.text(max_size=3),
)
streams = st.lists(
    st.one_of(
        words.map(Text),
        st.sampled_from(SPECIALS).map(Control),
        st.sampled_from(["<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"]).map(Control),
    ),
    max_size=20,
)


@given(stream=streams, inside=st.booleans(), data=st.data())
@FAST
def test_any_split_gives_the_same_reply(stream: list[Piece], inside: bool, data: st.DataObject) -> None:
    whole: list[Piece] = []
    for piece in stream:
        if whole and isinstance(piece, Text) and isinstance(whole[-1], Text):
            whole[-1] = Text(whole[-1].text + piece.text)
        else:
            whole.append(piece)
    split: list[Piece] = []
    for piece in whole:
        if isinstance(piece, Control):
            split.append(piece)
            continue
        cuts = sorted(data.draw(st.lists(st.integers(0, len(piece.text)), max_size=4)))
        bounds = [0, *cuts, len(piece.text)]
        split += [Text(piece.text[a:b]) for a, b in pairwise(bounds)]
    parsers = [ReplyParser(starts_in_thought=inside) for _ in range(2)]
    events = [
        [e for piece in run for e in parser.push(piece)] + parser.finish()
        for run, parser in zip((whole, split), parsers, strict=True)
    ]
    assert collect(events[0]) == collect(events[1]) == parse(whole, starts_in_thought=inside)
    kinds = (CallStarted, CallFinished, CallMalformed)
    calls = [[e for e in run if isinstance(e, kinds)] for run in events]
    assert calls[0] == calls[1]
    # every call that starts also ends, and no call is lost
    ends = [e for e in calls[0] if not isinstance(e, CallStarted)]
    assert [e.index for e in ends] == list(range(sum(p == Control("<|tool_call>") for p in whole)))
    assert all(isinstance(e, CallMalformed) or CallStarted(e.index, e.name) in calls[0] for e in ends)
    assert all(parser.finish() == [] for parser in parsers)


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**30), 10**30),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.sampled_from(['<|"|>', "<tool_call|>", "}", "a,b:c]"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.from_regex(r"[a-z_]{1,4}", fullmatch=True), inner, max_size=3),
    ),
    max_leaves=8,
)


@given(args=st.dictionaries(st.from_regex(r"[A-Za-z_]{1,6}", fullmatch=True), values, max_size=4))
@FAST
def test_what_the_template_writes_is_read_back(args: dict[str, Any], both: dict[str, Tokenizer]) -> None:
    out = SegmentWriter()
    out.control("<|tool_call>")
    out.text("call:f{")
    write_members(out, args, "arguments")
    out.text("}")
    out.control("<tool_call|>")
    segments = out.segments()
    stream = [segment for segment in segments if not isinstance(segment, Slot)]
    assert parse(stream).tool_calls == (CallFinished(0, "f", args),)
    # and the same through ids, as the model would write them
    tokenizer = both["byte-level"]
    detokenizer = tokenizer.detokenizer()
    ids = tokenizer.encode(segments).token_ids
    written = [p for i in ids for p in detokenizer.push(i)] + detokenizer.flush()
    assert parse(written).tool_calls == (CallFinished(0, "f", args),)


def test_a_reply_in_the_history_renders_as_the_model_wrote_it() -> None:
    """So the prefix cache holds over turns: reasoning loses exactly the newline that the template adds."""
    written = "<|channel>thought\nFirst this.\n<channel|>Then that."
    reply = parse(pieces(written + "<turn|>"))
    message = {"role": "assistant", "content": reply.text, "reasoning": reply.reasoning}
    segments = render([message], empty_thought=False, add_generation_prompt=False)
    assert segments[2:] == [Text("model\n"), *pieces(written), Control("<turn|>"), Text("\n")]
