"""Structured output end to end: schemas, regexes, choices and grammars rule what a model writes."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from dataclasses import replace
from datetime import date

import jsonschema
import pytest
from schemas import features, schema

from gemcut.engine.loop import Job
from gemcut.engine.model_files import ChatPrompt
from gemcut.errors import GemcutError, InvalidRequest
from gemcut.llm import LLM, AsyncLLM
from gemcut.outputs import CompletionOutput, RequestOutput
from gemcut.sampling import SamplingParams, StructuredOutputs

NUM_SCHEMAS = 300


@pytest.fixture(scope="module")
def llm():
    made = LLM(kv_bytes=256 << 20, max_num_seqs=128)
    yield made
    made._engine.close()


@pytest.fixture(scope="module")
def exact():
    made = LLM(kv_bytes=64 << 20, deterministic=True)
    yield made
    made._engine.close()


FORMATS = jsonschema.FormatChecker(jsonschema.Draft202012Validator.FORMAT_CHECKER.checkers)


@FORMATS.checks("date", raises=ValueError)
def is_date(value: object) -> bool:
    """RFC 3339 has a year 0, a leap year as 2000 is; Python has none."""
    if not isinstance(value, str):
        return True
    whole = re.fullmatch(r"\d{4}-\d{2}-\d{2}", value)
    return whole is not None and bool(date.fromisoformat(re.sub("^0000", "2000", value)))


def spaces(llm: LLM) -> list[int]:
    return [i for i, b in enumerate(llm.files.tokenizer.spellings()) if b and not b.strip()]


def ruled(seed: int = 0, max_tokens: int = 40, **wanted) -> SamplingParams:
    return SamplingParams(
        temperature=1.0, seed=seed, max_tokens=max_tokens, structured_outputs=StructuredOutputs(**wanted)
    )


def answers(
    llm: LLM, params: list[SamplingParams], prompts: list[str] | None = None
) -> list[CompletionOutput]:
    outputs = llm.generate(prompts or [f"{i} " for i in range(len(params))], params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def test_300_schemas(llm, record_property):
    schemas = [schema(i) for i in range(NUM_SCHEMAS)]
    rich = [s for s in schemas if features(s) & {"$ref", "anyOf", "pattern", "nesting"}]
    assert len(rich) >= 100
    # random text rarely gets out of spaces and of endless repetition by itself
    params = [
        replace(ruled(i, 200, json_schema=s), logit_bias=dict.fromkeys(spaces(llm), -20.0))
        for i, s in enumerate(schemas)
    ]
    ends = Counter()
    for answer, made in zip(answers(llm, params), schemas, strict=True):
        ends[answer.finish_reason] += 1
        assert answer.error is None
        if answer.finish_reason == "stop":
            jsonschema.Draft202012Validator(made, format_checker=FORMATS).validate(json.loads(answer.text))
    record_property("complete", ends["stop"])
    record_property("truncated", ends["length"])
    print(f"{ends['stop']} complete and valid, {ends['length']} truncated")
    assert ends["stop"] + ends["length"] == NUM_SCHEMAS
    assert ends["stop"] > 0.8 * NUM_SCHEMAS


def test_regex_choice_lark_and_any_object(llm):
    choices = ("yes", "no", "<turn|>", 'quo"ted\n', "näher 🙂")
    wanted = [
        *({"regex": "[a-c]{3}-[0-9]{1,4}x"} for _ in range(4)),
        *({"choice": choices} for _ in range(8)),
        *({"grammar": 'start: "(" start ")" | WORD\nWORD: /[xy]{1,3}/'} for _ in range(4)),
        *({"json_object": True} for _ in range(4)),
    ]
    for answer, one in zip(
        answers(llm, [ruled(i, 80, **w) for i, w in enumerate(wanted)]), wanted, strict=True
    ):
        if answer.finish_reason == "length":
            assert "grammar" in one or "json_object" in one
        elif "regex" in one:
            assert re.fullmatch(one["regex"], answer.text)
        elif "choice" in one:
            assert answer.text in choices
        elif "grammar" in one:
            assert re.fullmatch(r"\(*[xy]{1,3}\)*", answer.text)
        else:
            assert isinstance(json.loads(answer.text), dict)
        assert answer.token_ids[-1] in llm.files.defaults.eos or answer.finish_reason == "length"


def test_a_control_token_is_never_text(llm):
    answer = answers(llm, [ruled(choice=["<turn|>"])])[0]
    assert (answer.text, answer.finish_reason) == ("<turn|>", "stop")
    turn = llm.files.tokenizer.control_id("<turn|>")
    assert turn not in answer.token_ids[:-1]


def test_thought_first_then_the_grammar(llm):
    question = [{"role": "user", "content": "Is it red?"}]
    params = replace(ruled(3, 60, choice=["yes", "no"]), n=6)
    thinking = llm.chat([question], params, chat_template_kwargs={"enable_thinking": True}, use_tqdm=False)[0]
    opener = llm.files.tokenizer.control_id("<|channel>")
    thoughts = 0
    for answer in thinking.outputs:
        if answer.token_ids[0] == opener:
            thoughts += 1
        if answer.finish_reason == "stop":
            assert answer.text in ("yes", "no")
        else:
            assert answer.text == ""  # cut off within its thought
    assert thoughts
    for answer in llm.chat([question], params, use_tqdm=False)[0].outputs:
        assert answer.text in ("yes", "no")
        assert opener not in answer.token_ids


def test_free_rows_do_not_notice(exact):
    llm = exact
    free = [SamplingParams(temperature=1.0, seed=i, max_tokens=30) for i in range(6)]
    prompts = [f"free {i}" for i in range(6)]
    alone = answers(llm, free, prompts)
    mixed = answers(
        llm,
        [p for i, f in enumerate(free) for p in (f, ruled(i, 40, regex="[a-z]{30}"))],
        [p for f in prompts for p in (f, f"ruled {f}")],
    )
    assert [a.token_ids for a in mixed[::2]] == [a.token_ids for a in alone]
    assert all(re.fullmatch("[a-z]{30}", a.text) for a in mixed[1::2])


def test_one_step_ahead_the_same(exact):
    llm = exact
    params = [ruled(i, 40, json_schema=schema(i)) for i in range(4)]
    params += [SamplingParams(temperature=1.0, seed=9, max_tokens=20)]
    plain = answers(llm, params)
    llm._engine.ahead = True
    try:
        ahead = answers(llm, params)
    finally:
        llm._engine.ahead = False
    assert [a.token_ids for a in ahead] == [a.token_ids for a in plain]


def test_preempted_answers_are_the_same(exact):
    params = [ruled(i, 40, regex="([a-f]{5} ){5,20}") for i in range(6)]
    prompts = ["word " * 8] * 6
    expected = answers(exact, params, prompts)
    small = LLM(kv_bytes=1 << 19, max_num_seqs=8, deterministic=True, enable_prefix_caching=False)
    got = answers(small, params, prompts)
    assert small.stats().preemptions > 0
    assert [a.token_ids for a in got] == [a.token_ids for a in expected]
    small._engine.close()


def test_n_answers_have_a_state_each(llm):
    params = replace(ruled(5, 40, regex="[a-z]{5,9}"), n=4)
    outputs = llm.generate(["x"], params, use_tqdm=False)[0].outputs
    assert len({o.text for o in outputs}) > 1
    assert all(re.fullmatch("[a-z]{5,9}", o.text) for o in outputs)


def test_logprobs_are_of_the_model_not_of_the_grammar(llm):
    plain = llm.generate(["y"], SamplingParams(temperature=0.0, max_tokens=1, logprobs=5), use_tqdm=False)
    params = replace(ruled(0, 5, choice=["zz"]), logprobs=5)
    forced = llm.generate(["y"], params, use_tqdm=False)
    first, second = (o[0].outputs[0].logprobs for o in (plain, forced))
    assert first is not None
    assert second is not None
    assert second[0].top == first[0].top
    assert second[0].logprob < 0


def test_a_refused_token_ends_its_request_alone(llm, monkeypatch):
    launch = llm._engine.runner.launch
    monkeypatch.setattr(llm._engine.runner, "launch", lambda step, masks=None: launch(step))
    answer, free = answers(
        llm,
        [replace(ruled(regex="[0-9]{20}"), temperature=0.0), SamplingParams(temperature=0.0, max_tokens=8)],
        ["What colour?", "What colour?"],
    )
    assert answer.finish_reason == "error"
    assert answer.error is not None
    assert "The grammar refuses the token" in answer.error
    assert (free.error, len(free.token_ids)) == (None, 8)
    assert not llm._engine._states
    assert not llm._engine._failures


def test_nothing_stays_behind(llm):
    answers(llm, [ruled(i, 3, regex="[a-z]{50}") for i in range(4)])
    job = Job(
        request_id="gone",
        prompt=ChatPrompt(llm.files.tokenizer.encode_raw("a"), (), False),
        params=ruled(regex="[a-z]{50}"),
    )
    llm._engine.add(job)
    llm._engine.step()
    llm._engine.abort("gone")
    while not llm._engine.idle:
        llm._engine.step()
    with pytest.raises(InvalidRequest):  # refused by the scheduler, behind the grammar
        llm.generate([[5] * 100_000], ruled(regex="[a-z]"), use_tqdm=False)
    assert not llm._engine._states
    assert not llm._engine._failures


@pytest.mark.parametrize(
    ("wanted", "param", "words"),
    [
        ({"regex": "(" * 30_000 + ")" * 30_000}, "regex", "invalid regex"),
        ({"regex": "[a"}, "regex", "invalid regex"),
        ({"grammar": 'start: "a" other'}, "grammar", "other"),
        ({"json_schema": {"type": "strin"}}, "json_schema", "strin"),
        ({"json_schema": {"type": "string", "unknownKeyword": 1, "if": {}}}, "json_schema", "if"),
        ({"json_schema": {"$ref": "#/$defs/none"}}, "json_schema", "none"),
        ({"json_schema": {"$ref": "#"}}, "json_schema", "no text satisfies it"),
    ],
)
def test_what_is_no_grammar_is_refused_at_the_door(llm, wanted, param, words):
    with pytest.raises(InvalidRequest) as refused:
        llm.generate(["a"], ruled(**wanted), use_tqdm=False)
    assert refused.value.param == f"structured_outputs.{param}"
    assert words in str(refused.value)
    assert len(str(refused.value)) < 500


def test_exponential_regex_is_served(llm):
    answer = answers(llm, [ruled(0, 60, regex="(a+)+b")])[0]
    assert answer.error is None
    assert answer.finish_reason == "length" or re.fullmatch("a+b", answer.text)


def test_async_compiles_beside_the_engine():
    async def run() -> None:
        async with AsyncLLM(kv_bytes=64 << 20) as llm:
            free = SamplingParams(temperature=0.0, max_tokens=5)
            prompt = [{"role": "user", "content": "hi"}]
            await llm.generate(prompt, ruled(choice=["warm"]))
            # a schema that compiles for minutes: the others are served meanwhile
            hostile = asyncio.ensure_future(
                llm.generate(prompt, ruled(json_schema={"type": "integer", "multipleOf": 999_983}))
            )
            await asyncio.sleep(0.1)
            begun = time.monotonic()
            known = await llm.generate(prompt, ruled(choice=["warm"]))
            assert known.outputs[0].text == "warm"
            served = await llm.generate(prompt, free)
            assert isinstance(served, RequestOutput)
            assert not hostile.done() or time.monotonic() - begun > 1.5
            with pytest.raises(InvalidRequest, match="takes longer than 2 s to compile"):
                await hostile
            leaving = asyncio.ensure_future(
                llm.generate(prompt, ruled(json_schema={"type": "integer", "multipleOf": 999_979}))
            )
            await asyncio.sleep(0.1)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            again = await llm.generate(prompt, ruled(choice=["cold"]))
            assert again.outputs[0].text == "cold"
            assert not llm._service._compiling
            assert llm._engine.idle

    asyncio.run(run())


def test_closed_engine_takes_no_new_grammar():
    llm = LLM(kv_bytes=64 << 20)
    llm._engine.close()
    with pytest.raises(GemcutError, match="was closed"):
        llm.generate(["a"], ruled(choice=["a"]), use_tqdm=False)
    assert llm.generate(["a"], SamplingParams(max_tokens=1), use_tqdm=False)
