"""Pictures on their way into the engine: in this process when few, through workers when many or async."""

from __future__ import annotations

import asyncio
import io

import numpy as np
import pytest
from PIL import Image

import gemcut.llm
from gemcut.errors import InvalidRequest
from gemcut.llm import LLM, MANY_PICTURES, AsyncLLM
from gemcut.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=4)


def picture(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


def question(*pictures: bytes) -> list[dict[str, object]]:
    content = [{"type": "image", "image": data} for data in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What colour?"}]}]


def test_many_pictures_go_through_workers_and_give_the_same_prompts(monkeypatch):
    llm = LLM(kv_bytes=64 << 20)
    conversations = [question(picture(i)) for i in range(MANY_PICTURES)]
    conversations[3] = question(picture(100), picture(101))
    here = [llm.files.chat_prompt(c, image_tokens=70) for c in conversations]
    used = []

    class Counted(gemcut.llm.MediaWorkers):
        def load(self, parts, budget):
            used.append(len(parts))
            return super().load(parts, budget)

    monkeypatch.setattr(gemcut.llm, "MediaWorkers", Counted)
    there = llm._prompts(conversations, image_tokens=70)
    assert sum(used) == MANY_PICTURES + 1
    for a, b in zip(here, there, strict=True):
        assert a.prompt == b.prompt
        assert [m.digest for m in a.media] == [m.digest for m in b.media]
    llm._prompts(conversations[:2], image_tokens=70)
    assert sum(used) == MANY_PICTURES + 1  # few: decoded here
    conversations[5] = question(b"no picture")
    with pytest.raises(InvalidRequest, match="are no picture") as refused:
        llm._prompts(conversations, image_tokens=70)
    assert refused.value.param is not None


def test_async_decodes_in_workers():
    async def run() -> None:
        async with AsyncLLM(kv_bytes=64 << 20) as llm:
            options = {"mm_processor_kwargs": {"max_soft_tokens": 70}}
            assert llm._media.pids() == []
            outputs = await asyncio.gather(
                *(llm.generate(question(picture(i)), GREEDY, **options) for i in range(4))
            )
            assert llm._media.pids()
            with pytest.raises(InvalidRequest, match="truncated or damaged"):
                await llm.generate(question(picture(0)[:-20]), GREEDY, **options)
            for output in outputs:
                assert output.usage.image_tokens > 0
        assert llm._media.pids() == []

    asyncio.run(run())
