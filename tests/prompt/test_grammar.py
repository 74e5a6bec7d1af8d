"""Grammars over tokenizers of both kinds: masks, thoughts, hostile grammars, and what is remembered."""

from __future__ import annotations

import json
import os
import random
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from prompt_tokenizers import byte_level, gemma_like
from schemas import schema

from gemcut.errors import GemcutError, InvalidRequest
from gemcut.prompt.grammar import Grammars, GrammarState
from gemcut.prompt.tokenizer import Tokenizer
from gemcut.sampling import MAX_GRAMMAR_BYTES, SamplingParams, StructuredOutputs

EXTRA = 37  # rows of the logits beyond the vocabulary, not a multiple of 32


def make(folder: Path, built) -> tuple[Grammars, Tokenizer]:
    built.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder)
    ends = [tokenizer.control_id(token) for token in ("<eos>", "<turn|>", "<|tool_response>")]
    width = tokenizer.vocab_size + EXTRA
    image = tokenizer.control_id("<|image|>")
    return Grammars(tokenizer, width, ends, suppressed=[image, *tokenizer.encode_text("~")]), tokenizer


@pytest.fixture(scope="module", params=["byte_level", "gemma_like"])
def both(request, tmp_path_factory):
    built = byte_level() if request.param == "byte_level" else gemma_like()
    grammars, tokenizer = make(tmp_path_factory.mktemp(request.param), built)
    yield grammars, tokenizer
    grammars.close()


@pytest.fixture(scope="module")
def grammars(tmp_path_factory):
    made, _ = make(tmp_path_factory.mktemp("grammars"), byte_level())
    yield made
    made.close()


def admitted(state: GrammarState) -> list[int]:
    mask = state.mask()
    assert mask.dtype == np.int32
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def walk(state: GrammarState, tokenizer: Tokenizer, dice: random.Random, most: int = 400) -> tuple[str, bool]:
    """A random answer, and whether it is complete."""
    ids, ends = [], {tokenizer.control_id("<eos>"), tokenizer.control_id("<turn|>")}
    for _ in range(most):
        choices = admitted(state)
        done = ends & set(choices)
        token = min(done) if done else dice.choice(choices)
        assert state.take(token) is None
        if token in ends:
            return tokenizer.decode(ids), True
        ids.append(token)
    return tokenizer.decode(ids), False


def test_random_walks_satisfy_what_was_asked(both):
    grammars, tokenizer = both
    dice = random.Random(0)
    import re

    for pattern in ("[a-c]{2,5}x", "(the |and )+1", "é|漢字|🙂", "<[a-z|]+>", "[^a-z]{3}"):
        grammar = grammars.compile(StructuredOutputs(regex=pattern))
        for _ in range(5):
            text, complete = walk(grammars.begin(grammar), tokenizer, dice)
            assert not complete or re.fullmatch(pattern, text, re.DOTALL), text
    words = ("<turn|>", "the answer", "the anchor", 'qu"ote\\', "\n", "漢字 🙂")
    grammar = grammars.compile(StructuredOutputs(choice=words))
    found = {walk(grammars.begin(grammar), tokenizer, dice) for _ in range(40)}
    assert found == {(word, True) for word in words}
    complete = 0
    for seed in range(40):
        grammar = grammars.compile(StructuredOutputs(json_schema=schema(seed)))
        text, done = walk(grammars.begin(grammar), tokenizer, dice)
        if done:
            complete += 1
            json.loads(text)
    assert complete > 10


def test_masks_hold_no_control_no_hole_and_nothing_suppressed(both):
    grammars, tokenizer = both
    state = grammars.begin(grammars.compile(StructuredOutputs(regex="(.|\n)*")))
    ids = set(admitted(state))
    ends = {tokenizer.control_id("<eos>"), tokenizer.control_id("<turn|>")}
    assert ids & set(tokenizer.controls.values()) == ends  # an answer that calls a tool ends otherwise
    assert max(ids) < tokenizer.vocab_size
    assert not ids & set(tokenizer.encode_text("~"))
    assert set(tokenizer.encode_text("a{")) <= ids
    assert tokenizer.encode_text("é")[0] in ids


def test_complete_admits_the_end_alone(both):
    grammars, tokenizer = both
    state = grammars.begin(grammars.compile(StructuredOutputs(choice=["a"])))
    assert state.take(tokenizer.encode_text("a")[0]) is None
    ends = sorted({tokenizer.control_id("<eos>"), tokenizer.control_id("<turn|>")})
    assert admitted(state) == ends
    assert state.take(ends[0]) is None
    assert admitted(state) == ends


def test_states_are_independent(grammars):
    grammar = grammars.compile(StructuredOutputs(regex="ab*c"))
    one, two = grammars.begin(grammar), grammars.begin(grammar)
    a = admitted(one)
    assert one.take(a[0]) is None
    assert admitted(two) == a
    assert admitted(one) != a
    masks = grammars.masks({7: one, 3: two, 5: grammars.begin(grammar)})
    assert np.array_equal(masks[7], one.mask())
    assert np.array_equal(masks[3], masks[5])


def test_thoughts(both):
    grammars, tokenizer = both
    opener, closer = tokenizer.control_id("<|channel>"), tokenizer.control_id("<channel|>")
    grammar = grammars.compile(StructuredOutputs(choice=["yes"]))
    content = admitted(grammars.begin(grammar))
    assert opener not in content

    state = grammars.begin(grammar, "opening")
    assert set(admitted(state)) == {*content, opener}
    assert state.take(opener) is None
    free = set(admitted(state))
    assert free & set(tokenizer.controls.values()) == {closer}  # it can neither end nor call
    for token in tokenizer.encode_text("thought\nno, {"):
        assert token in free
        assert state.take(token) is None
    assert state.take(closer) is None
    assert admitted(state) == content  # and does not think again

    straight = grammars.begin(grammar, "opening")
    assert straight.take(content[0]) is None
    assert opener not in admitted(straight)

    within = grammars.begin(grammar, "thought")
    assert within.take(closer) is None
    assert admitted(within) == content


@pytest.mark.parametrize("form", [None, StructuredOutputs(choice=["yes"])])
def test_a_thought_that_is_long_enough_is_closed(both, form):
    grammars, tokenizer = both
    opener, closer = tokenizer.control_id("<|channel>"), tokenizer.control_id("<channel|>")
    grammar = None if form is None else grammars.compile(form)
    for phase in ("opening", "thought"):
        state = grammars.begin(grammar, phase, max_thought_tokens=3)
        if phase == "opening":
            assert opener in admitted(state)
            assert state.take(opener) is None
        for token in tokenizer.encode_text("abc")[:1] * 3:
            assert len(admitted(state)) > 1
            assert state.take(token) is None
        assert admitted(state) == [closer]
        assert state.take(closer) is None
        content = admitted(state)
        assert closer not in content or form is None
        assert (tokenizer.control_id("<|tool_call>") in content) == (form is None)


def test_without_a_form_all_is_free_but_another_thought(both):
    grammars, tokenizer = both
    state = grammars.begin(None, "opening", max_thought_tokens=2)
    everything = admitted(state)
    assert {tokenizer.control_id("<turn|>"), tokenizer.control_id("<|channel>")} <= set(everything)
    assert not set(everything) & set(tokenizer.encode_text("~"))  # suppressed
    word = tokenizer.encode_text("a")[0]
    assert state.take(word) is None
    assert admitted(state) == everything
    for token in (tokenizer.control_id("<|channel>"), word, word):
        assert state.take(token) is None
    assert admitted(state) == [tokenizer.control_id("<channel|>")]  # a late thought has a bound too


def test_a_token_that_is_refused_stays_an_error(grammars):
    state = grammars.begin(grammars.compile(StructuredOutputs(regex="[0-9]+")))
    wrong = max(set(range(24, 200)) - set(admitted(state)))
    error = state.take(wrong)
    assert error is not None
    assert f"refuses the token {wrong}" in error
    assert "<state>" not in error
    assert state.take(admitted(state)[0]) == error


def test_a_grammar_that_only_suppressed_tokens_satisfy(grammars):
    state = grammars.begin(grammars.compile(StructuredOutputs(choice=["~"])))
    state.mask()
    assert state.error is not None
    assert "admits no token" in state.error


HOSTILE = {
    "parentheses": {"regex": "(" * 30_000 + "a" + ")" * 30_000},
    "brackets": {"regex": "[" * 30_000},
    "exponential": {"regex": "(a+)+b"},
    "nested pluses": {"regex": "(" * 50 + "a" + ")+" * 50 + "b"},
    "repetition": {"regex": "((a{1000}){1000}){1000}"},
    "late repetition": {"regex": "x((a{1000}){1000}){1000}"},
    "alternatives": {"regex": "|".join(f"(?:.*{i}.*)" for i in range(2000))},
    "literal": {"regex": "a" * 200_000},
    "deep items": {"json_schema": '{"items":' * 20_000 + "{}" + "}" * 20_000},
    "deep properties": {"json_schema": '{"properties":{"a":' * 300 + "{}" + "}}" * 300},
    "reference to itself": {"json_schema": {"$ref": "#"}},
    "chain of references": {
        "json_schema": {
            "$defs": {**{f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(7000)}, "a7000": {}},
            "$ref": "#/$defs/a0",
        }
    },
    "doubled references": {
        "json_schema": {
            "$defs": {
                **{f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)},
                "a30": {"type": "string"},
            },
            "$ref": "#/$defs/a0",
        }
    },
    "product of choices": {
        "json_schema": {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "string"}}} for j in range(10)]}
                for i in range(12)
            ]
        }
    },
    "multiples": {"json_schema": {"type": "integer", "multipleOf": 999_983}},
    "length": {"json_schema": {"type": "string", "minLength": 100_000, "maxLength": 1_000_000}},
    "items": {"json_schema": {"type": "array", "minItems": 10**12}},
    "properties": {
        "json_schema": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}
    },
    "left recursion": {"grammar": 'start: start start | "a"'},
    "deep rule": {"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "chain of rules": {
        "grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(9000)) + '\nr9000: "a"'
    },
    "doubled terminals": {
        "grammar": "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40)) + '\nA40: "a"'
    },
}


def test_hostile_grammars_are_refused_or_served_in_time(grammars):
    grammars.compile(StructuredOutputs(choice=["warm"]))
    refused: dict[str, InvalidRequest] = {}
    slowest = 0.0
    for name, wanted in HOSTILE.items():
        begun = time.monotonic()
        try:
            grammar = grammars.compile(StructuredOutputs(**wanted))
        except InvalidRequest as error:
            refused[name] = error
        else:
            state = grammars.begin(grammar)
            for _ in range(20):
                started = time.monotonic()
                choices = admitted(state)
                slowest = max(slowest, time.monotonic() - started)
                if state.error is not None or state.take(random.Random(0).choice(choices)):
                    break
        assert time.monotonic() - begun < 10, name  # twice the deadline, on a machine that others load too
    for name, error in refused.items():
        assert (error.param or "").startswith("structured_outputs."), name
        assert len(str(error)) < 600, name
    print(f"{len(refused)} of {len(HOSTILE)} refused; the slowest mask took {slowest:.2f} s")
    assert {"parentheses", "deep items", "chain of references", "multiples"} <= set(refused)
    assert not {"exponential", "nested pluses", "left recursion"} & set(refused)
    # the process of the trials died several times, and works
    assert grammars.compile(StructuredOutputs(choice=["after"]))


def test_1000_schemas_keep_memory_bounded(tmp_path):
    made, _ = make(tmp_path, byte_level())
    begun = time.monotonic()
    sizes = []
    for i in range(1000):
        made.compile(StructuredOutputs(json_schema={**schema(i), "title": f"number {i}"}))
        if i in (99, 999):
            sizes.append(_resident())
    print(f"1,000 schemas: {time.monotonic() - begun:.1f} s, +{(sizes[1] - sizes[0]) >> 20} MiB")
    assert len(made._compiled) <= 256
    assert made._bytes <= 256 << 20
    assert sizes[1] - sizes[0] < 128 << 20
    made.close()


def test_cache(tmp_path):
    made, _ = make(tmp_path, byte_level())
    made._max_entries = 2
    wanted = [StructuredOutputs(choice=[word]) for word in ("a", "b", "c")]
    assert made.known(wanted[0]) is None
    first = made.compile(wanted[0])
    assert made.compile(StructuredOutputs(choice=["a"])) is first
    assert made.num_compiled == 1
    made.compile(wanted[1])
    assert made.known(wanted[0]) is first  # the latest now
    made.compile(wanted[2])
    assert made.known(wanted[1]) is None
    assert made.known(wanted[0]) is first
    assert made.known(StructuredOutputs(regex="a")) is None  # the same text as something else
    made._max_bytes = 0
    assert made.begin(made.compile(wanted[1])).mask().any()  # served, not kept
    assert made._bytes == 0
    made.close()
    with pytest.raises(GemcutError, match="closed"):
        made.compile(StructuredOutputs(choice=["z"]))


def test_prepared_before_the_first_grammar(tmp_path):
    made, _ = make(tmp_path, byte_level())
    made.prepare()
    assert made._built is not None
    _, pool, _ = made._built
    begun = time.monotonic()
    while not pool.pids():
        assert time.monotonic() - begun < 10
        time.sleep(0.01)
    pids = pool.pids()
    assert made.compile(StructuredOutputs(choice=["a"]))
    assert pool.pids() == pids
    made.close()


def test_no_process_and_no_descriptor_stays(tmp_path):
    descriptors = len(os.listdir("/proc/self/fd"))
    made, _ = make(tmp_path, byte_level())
    assert made._built is None
    made.compile(StructuredOutputs(json_object=True))
    made.close()
    made.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({}, None),
        ({"regex": "a", "choice": ["b"]}, None),
        ({"regex": ""}, "regex"),
        ({"regex": 5}, "regex"),
        ({"grammar": b"start"}, "grammar"),
        ({"choice": []}, "choice"),
        ({"choice": "yes"}, "choice"),
        ({"choice": ["yes", 1]}, "choice"),
        ({"choice": ["yes", ""]}, "choice"),
        ({"choice": ["\ud800"]}, "choice"),
        ({"json_object": 1}, "json_object"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": "[]"}, "json_schema"),
        ({"json_schema": [1]}, "json_schema"),
        ({"json_schema": {"a": float("nan")}}, "json_schema"),
        ({"json_schema": {"a": object()}}, "json_schema"),
        ({"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "regex"),
    ],
)
def test_what_is_no_wish_is_refused(wanted, param):
    with pytest.raises(InvalidRequest) as refused:
        StructuredOutputs(**wanted)
    assert refused.value.param == ("structured_outputs" if param is None else f"structured_outputs.{param}")


def test_wishes_that_exclude_each_other():
    wanted = StructuredOutputs(regex="a")
    for name, value in (("min_tokens", 2), ("ignore_eos", True), ("allowed_token_ids", [1])):
        for rule in ({"structured_outputs": wanted}, {"max_thought_tokens": 5}):
            with pytest.raises(
                InvalidRequest, match=f"cannot be combined with {next(iter(rule))}"
            ) as refused:
                SamplingParams(**rule, **{name: value})
            assert refused.value.param == name
    with pytest.raises(InvalidRequest, match="must be StructuredOutputs"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
