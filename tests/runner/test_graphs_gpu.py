"""On a GPU: graphs, kernels and chunks change no answer, and deterministic mode keeps every bit."""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import rig
import tiny
import torch

from gemcut.errors import ConfigError
from gemcut.llm import LLM
from gemcut.outputs import RequestOutput
from gemcut.sampling import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS: dict[str, Any] = {
    "device": "cuda",
    "dtype": "float32",
    "max_num_seqs": 5,
    "max_num_batched_tokens": 96,
    "max_model_len": 400,
    "kv_bytes": 64 << 20,
}
TIGHT = 230_000  # bytes of KV in bf16: the longest of `TEXTS`, and not all four
DEMO: dict[str, Any] = SETTINGS | {"max_num_batched_tokens": 512, "max_model_len": 1024}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, top_k=40, top_p=0.95, max_tokens=12, ignore_eos=True, seed=3)
TEXTS = ["z", "a short one", "a list of numbers: " + ", ".join(map(str, range(50))), "Where is it? " * 9]


@pytest.fixture(scope="module", params=["dense", "moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    rig.save(folder, request.param)
    return folder


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def conversations(num_pictures: Sequence[int]) -> list[list[dict[str, Any]]]:
    """A question about so many pictures each."""
    asked = []
    for number, count in enumerate(num_pictures):
        content: list[dict[str, Any]] = [
            {"type": "image", "image": tiny.picture(200 + 60 * i, 300, seed=number + i)} for i in range(count)
        ]
        content.append({"type": "text", "text": f"What is {number}?"})
        asked.append([{"role": "user", "content": content}])
    return asked


def answers(llm: LLM, params: Sequence[SamplingParams] = (GREEDY, DRAWN)) -> list[RequestOutput]:
    found = []
    for some in params:
        found += llm.generate(TEXTS * 2, some, use_tqdm=False)
        budget = {"max_soft_tokens": 70}
        found += llm.chat(conversations([1, 0, 2, 1]), some, mm_processor_kwargs=budget, use_tqdm=False)
    return found


def tokens(llm: LLM) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in answers(llm)]


def explain(llm: LLM) -> str:
    """For a failed assertion: what ran, and what was dropped."""
    return f"{llm.used}\n{llm.stats()}"


# ---- what runs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_graph_passes_its_check(folder: Path, dtype: str) -> None:
    """`--graphs full` refuses to start if one size does not repeat the eager run bit by bit."""
    llm = LLM(str(folder), **SETTINGS | {"dtype": dtype}, graphs="full")
    assert llm.used.graphs == "full", explain(llm)
    assert llm.used.num_graphs > 20, explain(llm)
    answers(llm)
    stats = llm.stats()
    assert stats.graph_replays["full"] == stats.steps, explain(llm)
    assert stats.graph_replays["head"] > 0, explain(llm)
    assert not stats.eager_forwards, explain(llm)
    assert not stats.dropped_graphs, explain(llm)


def test_pieces_pass_their_checks_too(folder: Path) -> None:
    llm = LLM(str(folder), **SETTINGS, graphs="piecewise")
    assert (llm.used.graphs, llm.used.switched_off) == ("piecewise", ()), explain(llm)
    answers(llm)
    assert llm.stats().graph_replays["piecewise"] == llm.stats().steps, explain(llm)


def test_auto_takes_full_graphs_and_says_so(folder: Path) -> None:
    llm = LLM(str(folder), **SETTINGS)
    assert (llm.used.kernels, llm.used.graphs) == ("triton", "full"), explain(llm)
    assert llm.used.switched_off == (), explain(llm)
    assert llm.used.graph_bytes < 2 << 30


def test_torch_kernels_cannot_be_captured(folder: Path) -> None:
    with pytest.raises(ConfigError, match="torch kernels wait"):
        LLM(str(folder), **SETTINGS, kernels="torch", graphs="full")
    llm = LLM(str(folder), **SETTINGS, kernels="torch")
    assert llm.used.graphs == "off"
    assert [what for what, _ in llm.used.switched_off] == ["CUDA graphs"]


# ---- the same answers


def test_the_same_tokens_whatever_runs_them(folder: Path) -> None:
    """fp32: kernels torch and triton, graphs off, piecewise and full, prompts whole and in chunks."""
    want = tokens(LLM(str(folder), **SETTINGS, kernels="torch", graphs="off"))
    ways = [("torch", "off"), ("triton", "off"), ("triton", "piecewise"), ("triton", "full")]
    for (kernels, graphs), chunk in itertools.product(ways, [96, 640]):
        llm = LLM(str(folder), **SETTINGS | {"max_num_batched_tokens": chunk}, kernels=kernels, graphs=graphs)
        got = tokens(llm)
        differing = [i for i, (one, other) in enumerate(zip(got, want, strict=True)) if one != other]
        assert not differing, f"answers {differing} differ with chunks of {chunk}: {explain(llm)}"


def test_the_demo_answers_the_same_whatever_runs_it() -> None:
    def answered(**settings: Any) -> list[tuple[int, ...]]:
        llm = LLM(**DEMO | settings)
        asked = conversations([1, 2, 0, 1]) * 2
        found = llm.chat(asked, GREEDY, use_tqdm=False) + llm.generate(TEXTS, GREEDY, use_tqdm=False)
        return [output.outputs[0].token_ids for output in found]

    want = answered(kernels="torch", graphs="off")
    for graphs in ("off", "piecewise", "full"):
        assert answered(kernels="triton", graphs=graphs) == want, graphs


def test_graphs_repeat_eager_steps_bit_by_bit_in_deterministic_mode(folder: Path) -> None:
    """Tiles are fixed there, so that padding to a graph's size changes nothing at all."""
    logged = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)
    found = {}
    for graphs in ("off", "piecewise", "full"):
        llm = LLM(str(folder), **SETTINGS | {"dtype": "bfloat16"}, graphs=graphs, deterministic=True)
        found[graphs] = [output.outputs[0].logprobs for output in answers(llm, [logged])]
    assert found["piecewise"] == found["off"]
    assert found["full"] == found["off"]


# ---- deterministic mode


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_answers_do_not_depend_on_company(folder: Path, dtype: str) -> None:
    """Random companies, chunks and caches against each request alone: tokens and logprobs bit by bit."""
    logged = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, logprobs=1)
    drawn = SamplingParams(temperature=1.0, max_tokens=10, ignore_eos=True, logprobs=1, seed=5)
    settings = SETTINGS | {"dtype": dtype, "deterministic": True}
    alone = LLM(str(folder), **settings | {"max_num_batched_tokens": 640}, enable_prefix_caching=False)
    asked = [*conversations([1, 0, 2, 1, 0, 1]), *([{"role": "user", "content": text}] for text in TEXTS)]
    prompts = alone._prompts(asked, tools=None, image_tokens=70)
    requests = list(itertools.product(prompts, (logged, drawn)))

    def bits(output: RequestOutput) -> Any:
        return output.outputs[0].token_ids, output.outputs[0].logprobs

    want = [bits(alone._run([prompt], own, chat=True, use_tqdm=False)[0]) for prompt, own in requests]
    choose = random.Random(0)
    for chunk, cached in ((96, True), (96, False), (512, True)):
        llm = LLM(str(folder), **settings | {"max_num_batched_tokens": chunk}, enable_prefix_caching=cached)
        for _ in range(8):
            some = choose.sample(range(len(requests)), choose.randint(2, 9))
            outputs = llm._run(
                [requests[i][0] for i in some], [requests[i][1] for i in some], chat=True, use_tqdm=False
            )
            wrong = [i for i, output in zip(some, outputs, strict=True) if bits(output) != want[i]]
            assert not wrong, f"requests {wrong} of {some}, chunks of {chunk}: {explain(llm)}"


def test_a_small_pool_preempts_and_changes_nothing(folder: Path) -> None:
    settings = SETTINGS | {"deterministic": True, "dtype": "bfloat16", "page_size": 16}
    own = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True, logprobs=0, seed=1)
    roomy = LLM(str(folder), **settings)
    want = [output.outputs[0].logprobs for output in roomy.generate(TEXTS * 4, own, use_tqdm=False)]
    tight = LLM(str(folder), **settings | {"kv_bytes": TIGHT})
    got = [output.outputs[0].logprobs for output in tight.generate(TEXTS * 4, own, use_tqdm=False)]
    assert tight.stats().preemptions > 0, explain(tight)
    assert got == want


# ---- steps in flight


def test_rows_that_break_do_so_alone_through_graphs(folder: Path) -> None:
    """NaN in one row's cache: its request errs, the others' tokens are what they were."""
    llm = LLM(str(folder), **SETTINGS, page_size=16, graphs="full", enable_prefix_caching=False)
    want = [output.outputs[0].token_ids for output in llm.generate(TEXTS, GREEDY, use_tqdm=False)]
    runner: Any = llm._engine.runner
    launch = runner.launch

    def spoiled(step: Any, masks: Any = None) -> None:
        launch(step, masks)
        for row in step.rows:
            if row.slot == 2 and row.samples:
                pages = torch.from_numpy(runner.tables.host[1, 2, : row.start // 16 + 1]).long().cuda()
                for plan, kv in zip(runner.decoder.plan.layers, runner.kv.layers, strict=True):
                    if plan.kind == "full":
                        kv.v_pages[pages] = float("nan")

    runner.launch = spoiled
    outputs = llm.generate(TEXTS, GREEDY, use_tqdm=False)
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons.count("error") == 1, reasons
    for output, tokens_alone in zip(outputs, want, strict=True):
        if output.outputs[0].finish_reason != "error":
            assert output.outputs[0].token_ids == tokens_alone
