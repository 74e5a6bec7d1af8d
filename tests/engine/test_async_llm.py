"""AsyncLLM as its callers see it: streams side by side, deadlines, priorities, refusals, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from gemcut.engine.loop import Job
from gemcut.errors import GemcutError, InvalidRequest, Overloaded
from gemcut.llm import AsyncLLM
from gemcut.outputs import Delta, RequestOutput
from gemcut.sampling import SamplingParams

SETTINGS: dict[str, Any] = {"device": "cpu", "kv_bytes": 8 << 20, "max_model_len": 1024}
FOREVER = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)


def say(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def run(scenario: Callable[[AsyncLLM], Coroutine[Any, Any, None]], **settings: Any) -> None:
    async def whole() -> None:
        async with AsyncLLM(**(SETTINGS | settings)) as llm:
            await asyncio.wait_for(scenario(llm), timeout=60)

    asyncio.run(whole())


async def first_delta(stream: Any) -> Delta:
    return await anext(stream)


def test_streams_side_by_side_say_what_each_says_alone() -> None:
    prompts = [say(f"Repeat: {word}") for word in ("K7XQ2", "ABC", "9", "hello")] * 3
    params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=i % 2 == 0) for i in range(12)]

    async def scenario(llm: AsyncLLM) -> None:
        alone = [await llm.generate(p, s) for p, s in zip(prompts[:4], params[:4], strict=True)]

        async def collect(prompt: list[dict], own: SamplingParams) -> tuple[list[Delta], RequestOutput]:
            deltas: list[Delta] = []
            async for news in llm.stream(prompt, own):
                if isinstance(news, RequestOutput):
                    return deltas, news
                deltas.append(news)
            raise AssertionError("no output")

        together = await asyncio.gather(*(collect(p, s) for p, s in zip(prompts, params, strict=True)))
        for i, (deltas, output) in enumerate(together):
            answer = output.outputs[0]
            assert answer.token_ids == alone[i % 4].outputs[0].token_ids
            assert "".join(delta.text for delta in deltas) == answer.text
            assert tuple(t for delta in deltas for t in delta.token_ids) == answer.token_ids
            assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
            assert deltas[-1].finish_reason == answer.finish_reason
        assert len({output.request_id for _, output in together}) == len(together)

    run(scenario)


def test_a_deadline_ends_a_request_with_what_it_has() -> None:
    async def scenario(llm: AsyncLLM) -> None:
        running = await llm.generate(say("Hi"), FOREVER, deadline_s=0.4)
        answer = running.outputs[0]
        assert answer.finish_reason == "timeout"
        assert 0 < len(answer.token_ids) < 900
        waiting = await llm.generate(say("Hi"), FOREVER, deadline_s=0.0)
        assert waiting.outputs[0].finish_reason == "timeout"
        assert waiting.outputs[0].token_ids == ()
        assert (await llm.generate(say("Hi"), SamplingParams(max_tokens=1))).outputs[0].token_ids

    run(scenario)


def test_the_more_urgent_goes_first() -> None:
    async def scenario(llm: AsyncLLM) -> None:
        order: list[str] = []

        async def ask(name: str, priority: int) -> None:
            await llm.generate(
                say(f"I am {name}"), SamplingParams(max_tokens=3, ignore_eos=True), priority=priority
            )
            order.append(name)

        block = llm.stream(say("Hi"), FOREVER)  # holds the only place while the others arrive
        await first_delta(block)
        calls = [asyncio.ensure_future(ask(f"late {i}", 1)) for i in range(3)]
        await asyncio.sleep(0.1)
        calls += [asyncio.ensure_future(ask("urgent", -1)), asyncio.ensure_future(ask("normal", 0))]
        await asyncio.sleep(0.1)
        await block.aclose()
        await asyncio.gather(*calls)
        assert order == ["urgent", "normal", "late 0", "late 1", "late 2"]

    run(scenario, max_num_seqs=1)


def test_a_full_queue_refuses_and_goes_on() -> None:
    async def scenario(llm: AsyncLLM) -> None:
        block = llm.stream(say("Hi"), FOREVER)
        await first_delta(block)
        waiting = [asyncio.ensure_future(llm.generate(say("w"), SamplingParams(max_tokens=2))) for _ in "12"]
        await asyncio.sleep(0.1)
        with pytest.raises(Overloaded, match="wait already") as refused:
            await llm.generate(say("x"))
        assert refused.value.retry_after_s >= 1
        # one more place would do for the first of these two answers: the whole request is refused
        waiting.pop().cancel()
        await asyncio.sleep(0.1)
        with pytest.raises(Overloaded):
            await llm.generate(say("x"), SamplingParams(n=2, max_tokens=2))
        await block.aclose()
        assert (await waiting[0]).outputs[0].token_ids
        assert (await llm.generate(say("x"), SamplingParams(n=2, max_tokens=2))).usage.completion_tokens == 4

    run(scenario, max_num_seqs=1, max_waiting=2)


def test_a_refused_pair_between_two_steps_leaves_others_alone() -> None:
    """An abort and a refusal that meet before the next step: both end as they should."""
    llm = AsyncLLM(**SETTINGS, max_waiting=1, max_num_seqs=1)
    engine = llm._engine

    async def scenario() -> None:
        block = llm.stream(say("Hi"), FOREVER)
        await first_delta(block)

        def both() -> None:  # in the engine's thread, between steps
            engine.abort("r0")
            prompt = llm.files.chat_prompt(say("x"))
            job = Job(request_id="pair", prompt=prompt, params=SamplingParams(n=2, max_tokens=2))
            with pytest.raises(Overloaded):
                engine.add(job)

        llm._service._orders.put(both)
        async for news in block:
            if isinstance(news, RequestOutput):
                assert news.outputs[0].finish_reason == "abort"
        assert (await asyncio.wait_for(llm.generate(say("x"), SamplingParams(max_tokens=2)), 20)).outputs
        assert engine.scheduler.num_unfinished == 0

    asyncio.run(scenario())
    llm.close()


def test_closing_ends_what_runs_and_later_calls_are_refused() -> None:
    async def scenario() -> None:
        llm = AsyncLLM(**SETTINGS)
        streams = [llm.stream(say("Hi"), FOREVER) for _ in range(3)]
        for stream in streams:
            await first_delta(stream)

        async def read(stream: Any) -> None:
            async for _ in stream:
                pass

        readers = [asyncio.ensure_future(read(stream)) for stream in streams]
        await asyncio.to_thread(llm.close)
        for reader in readers:
            with pytest.raises(GemcutError, match="closed"):
                await asyncio.wait_for(reader, 5)
        with pytest.raises(GemcutError, match="has ended"):
            await llm.generate(say("Hi"))
        assert llm._engine.scheduler.num_unfinished == 0
        llm.close()  # once more does no harm

    asyncio.run(scenario())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_runner_reaches_every_stream_and_later_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        llm = AsyncLLM(**SETTINGS, max_num_seqs=2)
        streams = [llm.stream(say(f"I am {i}"), FOREVER) for i in range(2)]
        for stream in streams:
            await first_delta(stream)
        readers = [asyncio.ensure_future(llm.generate(say("wait"), FOREVER)) for _ in range(3)]
        await asyncio.sleep(0.05)

        def broken(*_: object) -> None:
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(llm._engine.runner, "launch", broken)

        async def read(stream: Any) -> None:
            async for _ in stream:
                pass

        for reader in [asyncio.ensure_future(read(stream)) for stream in streams] + readers:
            with pytest.raises(GemcutError, match="RuntimeError: the device is gone"):
                await asyncio.wait_for(reader, 5)
        with pytest.raises(GemcutError, match="has ended") as later:
            await llm.generate(say("Hi"))
        assert isinstance(later.value.__cause__, RuntimeError)
        await asyncio.wait_for(asyncio.to_thread(llm.close), 5)

    asyncio.run(scenario())


def test_what_is_refused_leaves_nothing_behind() -> None:
    async def scenario(llm: AsyncLLM) -> None:
        refused = [
            (say("1 2 3 " * 2000), None, {}),
            (say("x"), SamplingParams(max_tokens=2000), {}),
            (say("x"), SamplingParams(stop_token_ids=(99999,)), {}),
            (say("x"), SamplingParams(logit_bias={1 << 20: 1.0}), {}),
            (say("x"), None, {"mm_processor_kwargs": {"max_soft_tokens": 71}}),
            (say("x"), None, {"mm_processor_kwargs": {"size": 1}}),
            (say("x"), None, {"chat_template_kwargs": {"thinking": True}}),
            (say("x"), None, {"chat_template_kwargs": {"enable_thinking": "yes"}}),
            ([{"role": "user", "content": 7}], None, {}),
            ([{"role": "user", "content": [{"type": "image", "image": b"no picture"}]}], None, {}),
        ]
        for messages, params, options in refused:
            with pytest.raises(InvalidRequest) as error:
                await llm.generate(messages, params, **options)
            assert error.value.param is not None, error.value
        assert not llm._listeners
        assert llm._engine.idle
        assert llm._engine.scheduler.num_unfinished == 0
        assert (await llm.generate(say("x"), SamplingParams(max_tokens=1))).outputs[0].token_ids

    run(scenario)


def test_a_request_id_is_one_requests_own() -> None:
    async def scenario(llm: AsyncLLM) -> None:
        stream = llm.stream(say("Hi"), FOREVER, request_id="mine")
        await first_delta(stream)
        with pytest.raises(InvalidRequest, match="in use"):
            await llm.generate(say("Hi"), FOREVER, request_id="mine")
        assert (await first_delta(stream)).token_ids  # the first one goes on
        await stream.aclose()
        while not llm._engine.idle:
            await asyncio.sleep(0.01)
        output = await llm.generate(say("Hi"), SamplingParams(max_tokens=1), request_id="mine")
        assert output.request_id == "mine"

    run(scenario)


def test_a_caller_whose_event_loop_has_ended_harms_nobody() -> None:
    llm = AsyncLLM(**SETTINGS)
    ended = asyncio.new_event_loop()
    stream = llm.stream(say("Hi"), FOREVER)
    ended.run_until_complete(first_delta(stream))
    ended.close()  # without closing the stream: its news have nowhere to go
    output = asyncio.run(llm.generate(say("Hi"), SamplingParams(max_tokens=3, ignore_eos=True)))
    assert len(output.outputs[0].token_ids) == 3
    llm.close()
