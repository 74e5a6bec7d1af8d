"""Forced calls: whatever a model that chooses at random writes is a call, and fits the tool's schema."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from prompt_tokenizers import byte_level
from schemas import schema

from gemcut.errors import InvalidRequest
from gemcut.prompt.call_grammar import CalledTool, call_grammar
from gemcut.prompt.grammar import Grammars
from gemcut.prompt.replies import Reply, parse
from gemcut.prompt.tokenizer import Tokenizer
from gemcut.sampling import StructuredOutputs

NUM_SCHEMAS = 60


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Grammars, Tokenizer]]:
    folder: Path = tmp_path_factory.mktemp("calls")
    byte_level().save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder)
    ends = [tokenizer.control_id(token) for token in ("<eos>", "<turn|>", "<|tool_response>")]
    grammars = Grammars(tokenizer, tokenizer.vocab_size, ends)
    yield grammars, tokenizer
    grammars.close()


def tool(parameters: Mapping[str, Any] | None, name: str = "f") -> CalledTool:
    return CalledTool(name, parameters, "tools[0].function.parameters")


class Walker:
    """Writes replies that a grammar admits, a token at a time and at random. Ends what can be ended."""

    def __init__(self, made: tuple[Grammars, Tokenizer], *tools: CalledTool) -> None:
        self.grammars, self.tokenizer = made
        lark = call_grammar(tools, self.tokenizer.control_id)
        self.grammar = self.grammars.compile(StructuredOutputs(grammar=lark))
        wanted = ("<|tool_response>", "<tool_call|>", '<|"|>')
        self.first = [self.tokenizer.control_id(token) for token in wanted]

    def reply(self, seed: int, most: int = 400) -> Reply | None:
        """None if it was not complete after `most` tokens."""
        state, dice, ids = self.grammars.begin(self.grammar), random.Random(seed), []
        for _ in range(most):
            mask = state.mask()
            choices = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
            closing = [token for token in self.first if token in choices]
            token = closing[0] if closing and dice.random() < 0.5 else dice.choice(choices)
            assert state.take(token) is None
            ids.append(token)
            if token == self.first[0]:
                detokenizer = self.tokenizer.detokenizer()
                pieces = [piece for i in ids for piece in detokenizer.push(i)]
                return parse([*pieces, *detokenizer.flush()])
        return None


def arguments(made: tuple[Grammars, Tokenizer], parameters: Mapping[str, Any], count: int) -> list[Any]:
    """Arguments of calls of a tool, each checked against its schema."""
    walker, found = Walker(made, tool(parameters)), []
    for seed in range(count):
        reply = walker.reply(seed)
        if reply is not None:
            assert not reply.malformed_calls, reply.malformed_calls
            assert not reply.text
            for call in reply.tool_calls:
                jsonschema.validate(call.arguments, parameters)
                found.append(call.arguments)
    assert found, "no walk came to its end"
    return found


def test_any_reply_is_a_call_that_fits(made):
    refused = complete = 0
    for seed in range(NUM_SCHEMAS):
        parameters = schema(seed)
        try:
            walker = Walker(made, tool(parameters))
        except InvalidRequest as error:
            assert "cannot be held to" in str(error)  # noqa: PT017
            refused += 1
            continue
        for walk in range(3):
            reply = walker.reply(walk)
            if reply is None:
                continue
            complete += 1
            assert reply.tool_calls
            assert not reply.malformed_calls
            for call in reply.tool_calls:
                jsonschema.validate(call.arguments, parameters)
    print(f"{complete} replies, {refused} of {NUM_SCHEMAS} schemas refused")
    assert complete > NUM_SCHEMAS
    assert refused == 0


STRING = {"type": "string"}
FITTING: dict[str, dict[str, Any]] = {
    "no members": {"properties": {}},
    "map": {"additionalProperties": {"type": "integer"}},
    "more than declared": {
        "properties": {"a": {"const": 1}, "b": STRING},
        "required": ["b"],
        "additionalProperties": {"type": "boolean"},
    },
    "required alone": {"properties": {}, "required": ["x"], "additionalProperties": {"enum": [7]}},
    "keys that must be quoted": {
        "properties": {name: {"type": "null"} for name in ("a:b", "c,d", "{", " e ", "", 'f"', "g}")},
        "required": ["a:b", "c,d", "{", " e ", "", 'f"', "g}"],
    },
    "listed": {
        "properties": {"a": {"enum": ["x", 1, 1.5, None, True, {"k": ["v"]}, [], ""]}},
        "required": ["a"],
    },
    "listed of a type": {"properties": {"a": {"type": ["string", "null"], "enum": ["x", 1, None]}}},
    "tuple": {
        "properties": {"a": {"prefixItems": [STRING, {"type": "integer"}], "items": False, "minItems": 1}},
        "required": ["a"],
    },
    "tuple and more": {
        "properties": {"a": {"type": "array", "prefixItems": [{"const": 1}], "minItems": 2, "maxItems": 4}},
        "required": ["a"],
    },
    "lists": {
        "properties": {
            "a": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
            "b": {"type": "array", "items": {"type": "integer"}, "maxItems": 1},
            "c": {"type": "array", "maxItems": 0},
            "d": {"type": "array", "items": {"type": "null"}, "minItems": 1},
        },
        "required": ["a", "b", "c", "d"],
    },
    "bounds": {
        "properties": {
            "a": {"type": "integer", "minimum": 3, "exclusiveMaximum": 20},
            "b": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
            "c": {"minimum": 100},
            "d": {"type": "integer", "multipleOf": 7},
        },
        "required": ["a", "b", "c", "d"],
    },
    "strings": {
        "properties": {
            "a": {"type": "string", "minLength": 2, "maxLength": 3},
            "b": {"pattern": "^(x|y)/\\$[a-c]*$"},
            "c": {"pattern": "[0-9]\\$", "maxLength": 8},
            "d": {"pattern": "a$"},
        },
        "required": ["a", "b", "c", "d"],
    },
    "recursive": {
        "properties": {"tree": {"$ref": "#/$defs/tree"}},
        "required": ["tree"],
        "$defs": {
            "tree": {"properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}}}
        },
    },
    "alternatives by type": {"properties": {"a": {"oneOf": [{"type": "null"}, STRING]}}, "required": ["a"]},
    "alternatives by tag": {
        "oneOf": [
            {"properties": {"kind": {"const": "x"}, "size": {"type": "integer"}}, "required": ["kind"]},
            {"properties": {"kind": {"enum": ["y", "z"]}}, "required": ["kind"]},
        ]
    },
    "all of": {
        "allOf": [{"$ref": "#/$defs/a"}, {"properties": {"b": {"const": 1}}, "required": ["b"]}],
        "required": ["a"],
        "$defs": {"a": {"properties": {"a": {"type": "boolean"}}, "required": ["a"], "title": "A"}},
    },
    "one of all": {"properties": {"a": {"allOf": [{"type": "boolean"}], "title": "x"}}, "required": ["a"]},
    "anything": {"properties": {"a": {}, "b": True}, "required": ["a", "b"]},
    "annotations": {"properties": {"a": {"type": "null", "format": "x", "x-own": 1}}, "title": "t"},
}  # fmt: skip


@pytest.mark.parametrize("name", FITTING)
def test_keywords(made, name):
    arguments(made, {"type": "object", **FITTING[name]}, 12)


def test_json_may_come_instead(made):
    """For a model that may call, and whose answer has a form."""
    grammars, tokenizer = made
    answer = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    lark = call_grammar(
        [tool(None)], tokenizer.control_id, otherwise={**answer, "additionalProperties": False}
    )
    grammar = grammars.compile(StructuredOutputs(grammar=lark))
    state = grammars.begin(grammar)
    for token in tokenizer.encode_text('{ "a": 2}'):
        assert state.take(token) is None
    ends = {tokenizer.control_id("<eos>"), tokenizer.control_id("<turn|>")}
    assert set(np.flatnonzero(np.unpackbits(state.mask().view(np.uint8), bitorder="little"))) == ends
    state = grammars.begin(grammar)
    for piece in ("<|tool_call>", "call:f{}", "<tool_call|>", "<|tool_response>"):
        ids = [tokenizer.control_id(piece)] if piece[0] == "<" else tokenizer.encode_text(piece)
        assert [state.take(token) for token in ids] == [None] * len(ids)


def test_text_may_come_first_or_alone(made):
    """For a model that may call, and whose calls must fit."""
    grammars, tokenizer = made
    lark = call_grammar([tool({"properties": {"a": {"const": 1}}})], tokenizer.control_id, otherwise="text")
    grammar = grammars.compile(StructuredOutputs(grammar=lark))
    ends = {tokenizer.control_id("<eos>"), tokenizer.control_id("<turn|>")}
    opening = tokenizer.control_id("<|tool_call>")

    def admitted(*pieces: str) -> set[int]:
        state = grammars.begin(grammar)
        for piece in pieces:
            ids = [tokenizer.control_id(piece)] if piece[0] == "<" else tokenizer.encode_text(piece)
            assert [state.take(token) for token in ids] == [None] * len(ids)
        return set(np.flatnonzero(np.unpackbits(state.mask().view(np.uint8), bitorder="little")).tolist())

    assert opening in admitted()
    assert not ends & admitted()
    assert {opening, *ends} <= admitted("It is {call:f")
    assert admitted("I look.", "<|tool_call>", "call:f{a:") == set(tokenizer.encode_text("1"))


def test_null_where_openapi_allows_it(made):
    walker = Walker(made, tool({"properties": {"a": {"const": 1, "nullable": True}}, "required": ["a"]}))
    replies = [walker.reply(seed) for seed in range(8)]
    assert {call.arguments["a"] for reply in replies if reply for call in reply.tool_calls} == {1, None}


def test_only_the_tools_given_are_called(made):
    walker = Walker(made, tool(None, "one"), tool({"type": "object", "properties": {}}, "sécond"))
    names = set()
    for seed in range(20):
        reply = walker.reply(seed)
        assert reply is not None
        assert all(call.arguments == {} for call in reply.tool_calls)
        names |= {call.name for call in reply.tool_calls}
    assert names == {"one", "sécond"}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"type": "string"}, "must be of type object"),
        ({"not": {}}, "'not'"),
        ({"properties": {"a": {"uniqueItems": True}}}, "'uniqueItems'"),
        ({"properties": {"a": False}}, "admits no value"),
        ({"properties": {"a": {"type": "strin"}}}, "must be one of string"),
        ({"properties": {"a": {"type": "string", "enum": [1]}}}, "lists no value of its type"),
        ({"properties": {"a": {"enum": ["x"], "minLength": 1}}}, "'enum' together with 'minLength'"),
        ({"properties": {"a": {"anyOf": []}}}, "list of schemas"),
        ({"allOf": [{"properties": {"a": STRING}}, {"additionalProperties": False}]}, "in one schema and"),
        (
            {"allOf": [{"properties": {"a": STRING}}, {"properties": {"a": {"const": "x"}}}]},
            "a property in two",
        ),
        ({"properties": {"a": {"allOf": [{"minimum": 1}, {"minimum": 2}]}}}, "'minimum' in two"),
        ({"allOf": [{"$ref": "#"}]}, "nested more than"),
        ({"allOf": [{"$ref": "#/x", "required": ["a"]}], "x": {}}, "'$ref' together with"),
        ({"properties": {"a": {"oneOf": [STRING, {"type": "string"}]}}}, "'oneOf'"),
        ({"properties": {"a": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}}, "'oneOf'"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "there is no '#/$defs/none'"),
        ({"properties": {"a": {"$ref": "http://x/y"}}}, "must point into"),
        ({"properties": {"a": {"pattern": "^a|b$"}}}, "anchor in one of several branches"),
        ({"properties": {"a": {"pattern": 1}}}, "pattern must be a string"),
        ({"properties": {"a": {"minItems": -1}}}, "minItems must be a whole number"),
        ({"properties": {"a": {"minItems": 3, "maxItems": 2}}}, "asks for 3 items"),
        ({"properties": {"a": {"minimum": "1"}}}, "minimum must be a number"),
        ({"properties": [], "type": "object"}, "properties must be an object"),
        ({"required": ["a"], "additionalProperties": False}, "admits no value"),
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_named(made, parameters, words):
    with pytest.raises(InvalidRequest) as refused:
        call_grammar([tool(parameters)], made[1].control_id)
    assert words in str(refused.value)
    assert (refused.value.param or "").startswith("tools[0].function.parameters")


def test_names_that_no_call_can_hold(made):
    for name in ("a{b", " a", "a "):
        with pytest.raises(InvalidRequest, match="cannot be forced"):
            call_grammar([tool(None, name)], made[1].control_id)
