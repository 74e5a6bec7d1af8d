"""Look-alikes in the caches: another shape, palette, picture or tenant never gets what its twin left."""

from __future__ import annotations

import asyncio
import io

import numpy as np
import pytest
from PIL import Image

from gemcut.llm import LLM, AsyncLLM
from gemcut.outputs import RequestOutput
from gemcut.sampling import SamplingParams

SHORT = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
SETTINGS = {"kv_bytes": 4 << 20, "max_model_len": 512, "device": "cpu"}


@pytest.fixture
def llm() -> LLM:
    return LLM(**SETTINGS)


def ask(llm: LLM, image: Image.Image | bytes, text: str = "What is it? " * 4, **options) -> RequestOutput:
    """The picture first: everything up to it is the same for all, and shorter than a page."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return llm.chat([{"role": "user", "content": content}], SHORT, use_tqdm=False, **options)[0]


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, height * width * 3, dtype=np.uint8)
    return Image.fromarray(pixels.reshape(height, width, 3))


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def palettes() -> tuple[bytes, bytes]:
    """Two PNG files with the same indices and another palette."""
    indices = np.random.default_rng(1).integers(0, 2, 96 * 96).tolist()
    files = []
    for colors in ([255, 0, 0, 0, 0, 255], [0, 255, 0, 255, 255, 0]):
        image = Image.new("P", (96, 96))
        image.putdata(indices)
        image.putpalette(colors)
        files.append(png(image))
    return files[0], files[1]


def transparent() -> tuple[Image.Image, Image.Image]:
    """The same colours, another alpha."""
    pixels = np.full((96, 96, 4), 200, dtype=np.uint8)
    pixels[..., 3] = 255
    faint = pixels.copy()
    faint[..., 3] = 30
    return Image.fromarray(pixels), Image.fromarray(faint)


TWINS = {
    "same bytes, 30 x 100 and 100 x 30": (noise(30, 100), noise(100, 30)),
    "same bytes, 120 x 60 and 60 x 120": (noise(120, 60), noise(60, 120)),
    "palettes": palettes(),
    "alpha": transparent(),
    "one pixel": (noise(96, 96), noise(96, 96)),
    "another picture of the same size": (noise(96, 96), noise(96, 96, seed=9)),
}
TWINS["one pixel"][1].putpixel((95, 95), (1, 2, 3))


@pytest.mark.parametrize("name", list(TWINS))
def test_twins_share_nothing(llm: LLM, name: str) -> None:
    one, other = TWINS[name]
    alone = LLM(**SETTINGS)
    want = ask(alone, other).outputs[0]
    first = ask(llm, one)
    before = llm.stats()
    twin = ask(llm, other)
    assert twin.usage.cached_tokens == 0
    after = llm.stats()
    assert (after.encoder_hits, after.encoder_misses) == (before.encoder_hits, before.encoder_misses + 1)
    assert twin.outputs[0].token_ids == want.token_ids
    # the caches are at work: the very same thing again is found
    again = ask(llm, one)
    assert again.usage.cached_tokens >= again.usage.image_tokens
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_the_same_picture_by_other_means_is_the_same(llm: LLM) -> None:
    image = noise(96, 96)
    ask(llm, image)
    assert ask(llm, png(image)).usage.cached_tokens > 0


def test_another_budget_is_another_picture(llm: LLM) -> None:
    image = noise(96, 96)
    ask(llm, image)
    before = llm.stats().encoder_misses
    assert ask(llm, image, mm_processor_kwargs={"max_soft_tokens": 140}).usage.cached_tokens == 0
    assert llm.stats().encoder_misses == before + 1


def test_same_text_with_another_picture_and_another_text_with_the_same(llm: LLM) -> None:
    stem = "Look at it well, please. " * 2
    ask(llm, noise(96, 96), stem + "What is it? " * 4)
    assert ask(llm, noise(96, 96, 2), stem + "What is it? " * 4).usage.cached_tokens == 0
    before = llm.stats().encoder_misses
    other = ask(llm, noise(96, 96), stem + "Who was there? " * 4)
    assert other.usage.image_tokens <= other.usage.cached_tokens < len(other.prompt_token_ids) - 16
    assert llm.stats().encoder_misses == before


def test_another_tenant_finds_nothing() -> None:
    async def scenario() -> None:
        messages = [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": noise(96, 96)},
                    {"type": "text", "text": "What? " * 20},
                ],
            }
        ]
        async with AsyncLLM(**SETTINGS) as llm:
            cached = {}
            for name, salt in (("a", b"a"), ("b", b"b"), ("none", b""), ("a again", b"a"), ("b again", b"b")):
                output = await llm.generate(messages, SHORT, salt=salt)
                cached[name] = output.usage.cached_tokens
            assert cached["a"] == cached["b"] == cached["none"] == 0
            assert cached["a again"] == cached["b again"] > 70
            stats = llm.stats()
            assert (stats.encoder_misses, stats.encoder_hits) == (3, 0)

    asyncio.run(scenario())
