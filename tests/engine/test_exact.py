"""A request's answer does not depend on what else the engine does: bit for bit in deterministic mode."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

import pytest
import rig
import torch
from PIL import Image, ImageDraw

from gemcut.engine.model_files import ChatPrompt
from gemcut.llm import LLM
from gemcut.outputs import RequestOutput
from gemcut.plan import kv_bytes
from gemcut.sampling import SamplingParams

COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "black", "white"]


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    r = random.Random(seed)
    image = Image.new("RGB", size, (128, 130, 126))
    draw = ImageDraw.Draw(image)
    for _ in range(r.randint(1, 4)):
        x, y, d = r.randint(0, size[0] - 90), r.randint(0, size[1] - 90), r.randint(50, 90)
        draw.ellipse([x, y, x + d, y + d], fill=r.choice(COLORS))
    return image


def conversation(*parts: object) -> list[dict]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


REQUESTS = [
    conversation(picture(1, (480, 288)), "How many shapes are there?"),
    conversation(picture(1, (480, 288)), "List all shapes."),
    conversation("What is in this picture?", picture(2, (400, 400))),
    conversation(picture(3, (300, 500)), picture(4, (500, 300)), "Which image has more shapes?"),
    conversation(picture(5, (384, 384)), "Where is the circle?"),
    conversation("Repeat: K7XQ2"),
    conversation("Reverse: 4711"),
    conversation("What is 3 + 4? " + "Think about it for a while. " * 12),
    conversation(picture(6, (900, 120)), "What colour is it? " * 5, picture(1, (480, 288)), "And this?"),
]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=1.5, top_p=0.95, max_tokens=4, ignore_eos=True, logprobs=1, seed=7),
    SamplingParams(temperature=0.8, top_k=20, max_tokens=3, logprobs=0, seed=8),
]
SHORT = [  # for models with one token a byte
    conversation(picture(1, (480, 288)), "How many?"),
    conversation(picture(1, (480, 288)), "List all."),
    conversation("See: ", picture(2, (400, 400))),
    conversation(picture(3, (300, 500)), picture(4, (500, 300)), "Which?"),
    conversation("Repeat: K7XQ2"),
    conversation("Think about it for a while. " * 3),
]
CHUNKS = [96, 150, 512]  # tokens of a step


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = {}
    for kind in ("dense", "moe"):
        path = tmp_path_factory.mktemp(kind)
        rig.save(path, kind)
        folders[kind] = str(path)
    return folders


@cache
def engine(
    tokens: int,
    cached: bool,
    kv_bytes: int | None = None,
    *,
    model: str | None = None,
    deterministic: bool = True,
) -> LLM:
    return LLM(
        model,
        deterministic=deterministic,
        max_num_batched_tokens=tokens,
        max_num_seqs=6,
        enable_prefix_caching=cached,
        kv_bytes=kv_bytes,
        max_model_len=512,
        image_tokens=70,
    )


def bits(output: RequestOutput) -> tuple:
    """Everything that must not change."""
    answer = output.outputs[0]
    assert answer.logprobs is not None
    return answer.token_ids, answer.logprobs, answer.finish_reason, answer.text


@cache
def prompts_of(model: str | None) -> list[ChatPrompt]:
    files = engine(512, False, model=model).files
    return [files.chat_prompt(request) for request in (REQUESTS if model is None else SHORT)]


@cache
def solo(request: int, params: int, model: str | None = None, deterministic: bool = True) -> RequestOutput:
    return run(engine(512, False, model=model, deterministic=deterministic), [(request, params)], model)[0]


def compositions(seed: int, model: str | None = None) -> Iterator[tuple[int, bool, list[tuple[int, int]]]]:
    """Ten random batches: tokens of a step, cache on or off, and who is in it (request, parameters)."""
    r = random.Random(seed)
    for _ in range(10):
        tokens, cached = r.choice(CHUNKS), r.random() < 0.5
        count = r.randint(2, 6)
        yield (
            tokens,
            cached,
            [(r.randrange(len(prompts_of(model))), r.randrange(len(PARAMS))) for _ in range(count)],
        )


def run(llm: LLM, chosen: list[tuple[int, int]], model: str | None = None) -> list[RequestOutput]:
    """As `LLM.chat` with prompts that are rendered already."""
    prompts, params = [prompts_of(model)[q] for q, _ in chosen], [PARAMS[p] for _, p in chosen]
    return llm._run(prompts, params, chat=True, use_tqdm=False)


@pytest.mark.parametrize("seed", range(20))
def test_any_batch_gives_the_solo_answer(seed: int) -> None:
    for tokens, cached, chosen in compositions(seed):
        for (q, p), output in zip(chosen, run(engine(tokens, cached), chosen), strict=True):
            assert bits(output) == bits(solo(q, p)), f"request {q} with parameters {p} in {chosen}"


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("seed", range(2))
def test_any_batch_of_a_random_model_gives_the_solo_answer(
    kind: str, seed: int, tiny_folders: dict[str, str]
) -> None:
    """Random weights have near-ties, and a window of 8 cuts every picture."""
    model = tiny_folders[kind]
    for tokens, cached, chosen in compositions(seed, model):
        for (q, p), output in zip(
            chosen, run(engine(tokens, cached, model=model), chosen, model), strict=True
        ):
            assert bits(output) == bits(solo(q, p, model)), f"request {q}, parameters {p} in {chosen}"


@pytest.mark.parametrize("seed", range(20))
def test_without_deterministic_mode_the_tokens_are_the_same_in_fp32(seed: int) -> None:
    """Rounding differs with the batch; the demo's margins are wide enough for the same greedy tokens."""
    for tokens, cached, chosen in compositions(seed):
        greedy = [(q, 0) for q, _ in chosen]
        outputs = run(engine(tokens, cached, deterministic=False), greedy)
        for (q, p), output in zip(greedy, outputs, strict=True):
            got, want = output.outputs[0], solo(q, p, deterministic=False).outputs[0]
            assert got.token_ids == want.token_ids
            assert got.logprobs is not None
            assert want.logprobs is not None
            for mine, theirs in zip(got.logprobs, want.logprobs, strict=True):
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_the_cache_was_at_work() -> None:
    llm = engine(512, True)
    llm.chat(REQUESTS[3], PARAMS[0], use_tqdm=False)
    again = llm.chat(REQUESTS[3], PARAMS[0], use_tqdm=False)[0]
    assert again.usage.cached_tokens > 100
    assert bits(again) == bits(solo(3, 0))


def test_a_pool_of_a_tenth_preempts_and_changes_nothing() -> None:
    prompts = [prompts_of(None)[q] for q in (0, 2, 4, 5, 6, 8)] * 5
    params = [
        SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True, logprobs=0, seed=seed)
        for seed in range(len(prompts))
    ]
    roomy = engine(512, False)
    want = [bits(output) for output in roomy._run(prompts, params, chat=True, use_tqdm=False)]
    assert roomy.stats().preemptions == 0
    tokens = [len(prompt.prompt) + 20 for prompt in prompts]
    demand = sum(kv_bytes(roomy.files.plan.text, n, 4) for n in tokens)
    llm = engine(96, False, demand // 10)
    assert llm.stats().full_pages[0] * 16 < sum(tokens) // 6
    got = [bits(output) for output in llm._run(prompts, params, chat=True, use_tqdm=False)]
    assert got == want
    stats = llm.stats()
    assert stats.preemptions > 0
    assert stats.running == stats.waiting == 0
    assert stats.full_pages[2] == stats.sliding_pages[2] == 0
