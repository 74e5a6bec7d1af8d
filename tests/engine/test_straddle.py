"""Pictures across the edges of chunks, pages and windows: logits as of one forward.

`prompt_logprobs` read the model at every prompt position, and sampled tokens behind the prompt.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import rig
import torch
from PIL import Image
from tiny import picture

from gemcut.llm import LLM
from gemcut.outputs import RequestOutput
from gemcut.sampling import SamplingParams

READ_ALL = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=3, prompt_logprobs=3)
TOKENS_OF_PICTURE = 60  # of 200 x 300 pixels at a budget of 70; the tiny models' window is 8
FIRST, SECOND = picture(seed=1), picture(seed=2)
CONTEXT = 384


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["dense", "moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp(request.param)
    rig.save(path, request.param)
    return str(path)


@cache
def engine(folder: str, tokens: int, page_size: int, cached: bool, deterministic: bool = True) -> LLM:
    return LLM(
        folder,
        deterministic=deterministic,
        max_num_batched_tokens=tokens,
        max_num_seqs=4,
        page_size=page_size,
        enable_prefix_caching=cached,
        kv_bytes=4 << 20,
        max_model_len=CONTEXT,
    )


def talk(*parts: str | Image.Image) -> list[dict]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def run(llm: LLM, *conversations: list[dict], params: SamplingParams = READ_ALL) -> list[RequestOutput]:
    return llm.chat(list(conversations), params, mm_processor_kwargs={"max_soft_tokens": 70}, use_tqdm=False)


def bits(output: RequestOutput) -> tuple:
    answer = output.outputs[0]
    return output.prompt_logprobs, answer.token_ids, answer.logprobs


def picture_spans(llm: LLM, conversation: list[dict]) -> list[tuple[int, int]]:
    prompt = llm.files.chat_prompt(conversation, image_tokens=70).prompt
    return [(span.start, span.stop) for span in prompt.spans]


def at(position: int, text: str = "x") -> list[dict]:
    """A conversation whose picture begins at this position: one token a byte."""
    return talk(text * (position - PREAMBLE), FIRST, "what?")


PREAMBLE = 8  # "<bos><|turn>user\n" and "<|image>" before the soft tokens


def test_the_preamble_is_what_these_tests_think(folder: str) -> None:
    llm = engine(folder, CONTEXT, 16, False)
    for position in (PREAMBLE, 20, 31):
        assert picture_spans(llm, at(position)) == [(position, position + TOKENS_OF_PICTURE)]


@pytest.mark.parametrize("page_size", [4, 16, 64])
def test_chunk_and_page_edges(folder: str, page_size: int) -> None:
    # the picture begins just before, on and just after edges of pages (16, 64) and of the window (8)
    conversations = [at(position) for position in (8, 15, 16, 63, 65)]
    whole = engine(folder, CONTEXT, 16, False)
    want = [bits(run(whole, conversation)[0]) for conversation in conversations]
    stop = 16 + TOKENS_OF_PICTURE
    # a chunk that would end in the picture, just before its end, at it, behind it; and less than a picture
    for tokens in (stop - 1, stop, stop + 1, TOKENS_OF_PICTURE - 1, 7):
        llm = engine(folder, tokens, page_size, False)
        got = [bits(output) for output in run(llm, *conversations)]
        for position, (one, other) in enumerate(zip(got, want, strict=True)):
            assert one == other, f"{tokens} tokens a step, conversation {position}"


@pytest.mark.parametrize("between", ["", "y", "y" * 7, "y" * 8, "y" * 30])
def test_two_pictures(folder: str, between: str) -> None:
    conversation = talk("x" * 5, FIRST, *([between] if between else []), SECOND, "which?")
    want = bits(run(engine(folder, CONTEXT, 16, False), conversation)[0])
    for tokens, page_size in ((61, 4), (70, 16), (128, 64), (140, 16), (9, 4)):
        assert bits(run(engine(folder, tokens, page_size, False), conversation)[0]) == want


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("tokens", [CONTEXT, 70])
def test_a_cached_prefix_that_ends_near_a_picture(folder: str, page_size: int, tokens: int) -> None:
    """A hit may end before the picture, at its end or behind it, never inside: answers stay the same."""
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=3)
    hits = set()
    for position in (15, 16, 17):
        # the same beginning, then another ending: the hit is cut in the middle of what follows
        stem = "x" * (position - PREAMBLE)
        for ending in ("", "what", "what is it? " * 2):
            other = talk(stem, FIRST, ending + "!")
            want = run(engine(folder, CONTEXT, 16, False), other, params=params)[0].outputs[0]
            llm = engine(folder, tokens, page_size, True)
            run(llm, talk(stem, FIRST, ending + "?"), params=params)
            output = run(llm, other, params=params)[0]
            got = output.outputs[0]
            assert (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs)
            cached = output.usage.cached_tokens
            assert cached % page_size == 0
            assert not position < cached < position + TOKENS_OF_PICTURE
            hits.add((cached > 0) + (cached >= position + TOKENS_OF_PICTURE))
    assert 2 in hits, "no hit reached behind a picture"


def test_without_deterministic_mode_within_rounding(folder: str) -> None:
    conversations = [at(position) for position in (8, 16, 65)] + [talk(FIRST, SECOND, "which?")]
    want = run(engine(folder, CONTEXT, 16, False, False), *conversations)
    for tokens, page_size in ((75, 4), (76, 16), (77, 64), (9, 16)):
        for one, other in zip(
            run(engine(folder, tokens, page_size, False, False), *conversations), want, strict=True
        ):
            assert one.prompt_logprobs is not None
            assert other.prompt_logprobs is not None
            for mine, theirs in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
                assert mine is not None
                assert theirs is not None
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert one.outputs[0].token_ids == other.outputs[0].token_ids
