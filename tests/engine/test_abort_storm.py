"""Requests that their callers give up at any moment, by the thousand: nothing of them stays behind."""

from __future__ import annotations

import asyncio
import io
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import rig
from tiny import picture

from gemcut.engine.model_files import ChatPrompt
from gemcut.errors import Overloaded
from gemcut.llm import AsyncLLM
from gemcut.outputs import RequestOutput
from gemcut.sampling import SamplingParams, StructuredOutputs

AT_ONCE = 64  # streams open at a time, of one to three sequences; 24 run, the others wait
LONGEST_WAIT_S = 0.12  # before a caller gives up: from before the request is read to deep in its answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("storm")
    rig.save(path, "dense")
    return str(path)


def start(folder: str) -> AsyncLLM:
    return AsyncLLM(
        folder,
        device="cpu",
        max_waiting=AT_ONCE,  # so that some find no room
        max_num_seqs=24,
        max_num_batched_tokens=192,
        max_model_len=256,
        page_size=4,
        kv_bytes=1_200_000,  # a few hundred positions: preemption and eviction all the time
        image_tokens=70,
    )


def png(seed: int) -> bytes:
    out = io.BytesIO()
    picture(60, 90, seed).save(out, "PNG")
    return out.getvalue()


def conversation(*parts: object) -> list[dict]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Storm:
    """`count` requests against one engine, `AT_ONCE` at a time, and what became of them."""

    def __init__(self, llm: AsyncLLM, count: int, seed: int) -> None:
        self.llm, self.count, self.random = llm, count, random.Random(seed)
        self.fates: Counter[str] = Counter()
        self.num_overloaded = 0
        pictures = [picture(60, 90, i) for i in range(12)]
        files = llm.files
        self.prompts: list[ChatPrompt] = [
            files.chat_prompt(c)
            for c in [conversation("x" * n) for n in (1, 9, 40, 100)]
            + [conversation("a", p, "b" * 10) for p in pictures]
            + [conversation(pictures[0], pictures[i], "?") for i in range(1, 4)]
        ]

    async def run(self) -> None:
        room = asyncio.Semaphore(AT_ONCE)

        async def one(index: int) -> None:
            async with room:
                while (fate := await self._request(index)) == "overloaded":
                    self.num_overloaded += 1
                    await asyncio.sleep(LONGEST_WAIT_S)
                self.fates[fate] += 1

        await asyncio.gather(*(one(index) for index in range(self.count)))

    async def _request(self, index: int) -> str:
        r = self.random
        prompt: ChatPrompt | list[dict] = r.choice(self.prompts)
        if index % 40 == 7:  # these go through the media workers
            prompt = conversation("look", png(index), "and say")
        ruled = index % 50 == 3  # by a grammar that nobody had before
        params = SamplingParams(
            n=r.choice([1, 1, 1, 1, 2, 3]),
            max_tokens=r.randint(1, 60),
            temperature=1.0,
            ignore_eos=r.random() < 0.5 and not ruled,
            prompt_logprobs=r.choice([None, None, 1]),
            stop=("~",) if r.random() < 0.3 else (),
            structured_outputs=StructuredOutputs(regex=f"[a-z]{{1,{index + 1}}}") if ruled else None,
        )
        options = {
            "salt": r.choice([b"", b"a", b"b"]),
            "priority": r.choice([0, 0, 1]),
            "deadline_s": r.choice([None, None, r.random() * LONGEST_WAIT_S]),
        }
        way = r.choice(["leave", "cancel", "cancel", "cancel", "cancel", "stay"])
        try:
            if way == "cancel":
                call = asyncio.ensure_future(self.llm.generate(prompt, params, **options))
                await asyncio.wait([call], timeout=r.random() ** 2 * LONGEST_WAIT_S)
                if call.cancel():
                    await asyncio.wait([call])
                    return "cancelled"
                output = await call
            else:
                output, patience = None, r.randint(0, 12)
                stream = self.llm.stream(prompt, params, **options)
                async for news in stream:
                    if isinstance(news, RequestOutput):
                        output = news
                    elif way == "leave" and (patience := patience - 1) < 0:
                        break
                await stream.aclose()
                if output is None:
                    return "left"
        except Overloaded:
            return "overloaded"
        assert len(output.outputs) == params.n
        return output.outputs[0].finish_reason


def audit_each_step(llm: AsyncLLM) -> list[int]:
    """From now on every step checks all books against what the sequences hold. Returns [steps so far]."""
    engine, steps = llm._engine, [0]
    step = engine.step

    def audited():
        updates = step()
        memory = engine.scheduler.memory
        for pool in (memory.full, memory.sliding):
            assert pool is not None
            assert pool.num_free + pool.num_cached + pool.num_used == pool.num_pages
        memory.audit(engine.scheduler.running)
        steps[0] += 1
        return updates

    engine.step = audited
    return steps


async def quiet(llm: AsyncLLM, within_s: float = 2.0) -> None:
    """Wait until the engine has nothing left to do."""
    end = time.monotonic() + within_s
    while not (llm._engine.idle and llm._service._orders.empty()):
        assert time.monotonic() < end, f"the engine is busy {within_s} s after the last abort: {llm.stats()}"
        await asyncio.sleep(0.01)


def assert_nothing_held(llm: AsyncLLM) -> None:
    engine, scheduler = llm._engine, llm._engine.scheduler
    memory, runner = scheduler.memory, engine.runner
    assert not engine._groups
    assert not engine._states
    assert not engine._failures
    assert not engine._kept
    assert not llm._listeners
    assert not llm._service._compiling
    assert (len(scheduler.running), len(scheduler.waiting), scheduler.num_unfinished) == (0, 0, 0)
    assert len(scheduler._free_slots) == scheduler.limits.max_num_seqs
    assert memory.full is not None
    assert memory.sliding is not None
    assert memory.full.num_used == memory.sliding.num_used == 0
    memory.begin_step()  # the last step's media are given back when the next one is planned
    assert memory.encoder.num_held == 0
    freed = len(memory.encoder.drain_freed())
    assert len(runner.soft) - freed == len(memory.encoder._sizes)


def storm(folder: str, count: int) -> Counter[str]:
    llm = start(folder)
    steps = audit_each_step(llm)

    async def scenario() -> Counter[str]:
        # workers, grammar threads and asyncio's own threads come up with the first requests
        await Storm(llm, 150, seed=1).run()
        await quiet(llm)
        assert_nothing_held(llm)
        before = descriptors(), len(asyncio.all_tasks())
        attack = Storm(llm, count, seed=2)
        await attack.run()
        await quiet(llm)
        assert_nothing_held(llm)
        assert (descriptors(), len(asyncio.all_tasks())) == before
        # and it still answers, alone and right
        once = [await llm.generate(attack.prompts[5], SamplingParams(temperature=0, max_tokens=9))]
        once.append(await llm.generate(attack.prompts[5], SamplingParams(temperature=0, max_tokens=9)))
        assert once[0].outputs[0].token_ids == once[1].outputs[0].token_ids
        stats = llm._engine.stats()
        assert min(attack.num_overloaded, stats.preemptions, stats.prefix_hits, stats.encoder_hits) > 0, stats
        return attack.fates

    fates = asyncio.run(scenario())
    llm.close()
    assert sum(fates.values()) == count
    assert steps[0] > count // 50
    return fates


@pytest.mark.parametrize(
    "count", [1500, pytest.param(12_000, marks=pytest.mark.slow)], ids=["short", "whole"]
)
def test_after_a_storm_of_aborts_everything_is_back(folder: str, count: int) -> None:
    threads, files = threading.active_count(), descriptors()
    fates = storm(folder, count)
    # every way out was taken, and often
    assert fates["cancelled"] + fates["left"] + fates["timeout"] > count * 5 // 6, fates
    assert min(fates[way] for way in ("timeout", "length", "stop")) > count // 200, fates
    deadline = time.monotonic() + 2
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads
    assert descriptors() == files
