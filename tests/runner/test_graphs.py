"""Sizes of graphs, the choice of one for a step, what is dropped and why, and answers through padded steps.

There is no GPU here: a replay runs the captured function again, on the memory it was captured with. All but
the capture itself is what a GPU runs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import rig
import tiny
import torch
from fake_capture import FakeCapture

from gemcut.data import MediaSpan, Row
from gemcut.errors import ConfigError
from gemcut.llm import LLM
from gemcut.outputs import RequestOutput
from gemcut.runner import capture
from gemcut.runner.capture import Recorder, Replay
from gemcut.runner.encode import MOST_CAPTURED, PICTURES, pack
from gemcut.runner.graphs import (
    FINE_FROM,
    Graph,
    Graphs,
    compare,
    decode_sizes,
    encoder_sizes,
    other_sizes,
    padding_waste,
)
from gemcut.runner.runner import ModelRunner
from gemcut.sampling import SamplingParams

PAGES = 7
PLENTY = 1 << 40


# ---- sizes


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 9, 64, 65, 100, 256, 1000])
def test_decode_sizes_reach_the_largest_batch_with_little_padding(most: int) -> None:
    sizes = decode_sizes(most, PAGES)
    rows = [size.rows for size in sizes]
    assert rows == sorted(set(rows))
    assert (rows[0], rows[-1]) == (1, most)
    assert all(size.tokens == size.rows and not size.media and size.pages == PAGES for size in sizes)
    for less, more in pairwise(rows):
        assert more - less <= max(8, less // 4)


@pytest.mark.parametrize("tokens", [1, 16, 100, 256, 257, 1120, 2048, 5000, 8192])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_other_sizes_reach_the_largest_step_and_waste_an_eighth_at_most(tokens: int, rows: int) -> None:
    sizes = other_sizes(tokens, rows, PAGES, media=True)
    counts = [size.tokens for size in sizes]
    assert counts == sorted(set(counts))
    assert counts[-1] == tokens
    assert padding_waste(sizes) < 0.12
    for count in range(FINE_FROM + 1, tokens + 1):
        size = next(size for size in counts if size >= count)
        assert 1 - count / size <= padding_waste(sizes)
    for size in sizes:
        assert size.rows in (rows, rows + 1)
        assert size.tokens != size.rows, "attention takes that for a step of single tokens"


def test_a_step_takes_the_smallest_graph_that_holds_it() -> None:
    def graph(size: Any) -> Graph:
        return Graph("full", size, lambda: None)

    graphs = Graphs(
        decodes=[graph(size) for size in decode_sizes(64, PAGES)],
        others=[graph(size) for size in other_sizes(512, 64, PAGES, media=True)],
    )

    def find(*counts: int, **settings: Any) -> Any:
        rows = [Row(slot, 5, count, None, True, **settings) for slot, count in enumerate(counts)]
        found = graphs.find(rows)
        return found and (found.size.tokens, found.size.rows)

    assert find(1) == (1, 1)
    assert find(1, 1, 1) == (4, 4)
    assert find(*[1] * 57) == (64, 64)
    assert find(2) == find(15, 1) == (16, 64)
    assert find(257) == (288, 64)
    assert find(512) == (512, 64)
    assert find(512, 1) is None
    span = MediaSpan("image", b"", 5, 6)
    assert find(1, spans=(span,)) == (16, 64), "graphs of single tokens look at no pictures"


# ---- what is kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    rig.save(folder, "moe", text_only=True)
    return folder


@pytest.fixture
def runner(folder: Path) -> ModelRunner:
    settings = {"max_num_batched_tokens": 40, "max_num_seqs": 3, "max_model_len": 100}
    return rig.Rig(folder, **settings).runner


SIZES = ["40 tokens of 3 rows", "32 tokens of 3 rows", "16 tokens of 3 rows"]
DECODES = [f"{n} tokens of {n} rows" for n in (3, 2, 1)]


def test_every_size_is_captured_the_largest_first(runner: ModelRunner) -> None:
    sizes: list[int] = []
    forward = runner.forward
    runner.forward = lambda size, *rest: sizes.append(size.tokens) or forward(size, *rest)  # type: ignore[method-assign]
    fake = FakeCapture()
    runner.capture(("full",), PLENTY, lambda: fake)
    assert fake.asked == ["full"] * 12  # 3 for single tokens, their 6 heads, 3 others
    # each runs eagerly and as a replay; the largest of both kinds also before
    assert sizes == [3, 40, 3, 3, 2, 2, 1, 1, 40, 40, 32, 32, 16, 16]
    assert (len(runner.graphs), runner.graphs.kinds, runner.graphs.dropped) == (12, "full", [])
    assert not runner.counts.dropped


def wrong(runner: ModelRunner) -> Any:
    """A replay that loses the last bit of a hidden state."""

    def spoil(kind: str, replay: Replay) -> Replay:
        def run() -> None:
            replay()
            bits = runner.picked.view(torch.int32)
            bits[0, 7] ^= 1

        return run if kind == "full" else replay

    return spoil


def stale(runner: ModelRunner) -> Any:
    """A replay that does nothing: what the run before it left must not pass for its own."""
    return lambda kind, replay: (lambda: None) if kind == "full" else replay


def failing(runner: ModelRunner) -> Any:
    def spoil(kind: str, replay: Replay) -> Replay:
        if kind == "full":
            raise RuntimeError("operation not permitted when stream is capturing")
        return replay

    return spoil


@pytest.mark.parametrize(
    ("spoil", "reason", "words"),
    [
        (wrong, "check", "not the eager run's in 1 of"),
        (stale, "check", ""),
        (failing, "capture", "not permitted"),
    ],
)
def test_what_is_not_the_eager_run_steps_down(
    runner: ModelRunner, caplog: pytest.LogCaptureFixture, spoil: Any, reason: str, words: str
) -> None:
    with caplog.at_level(logging.WARNING):
        runner.capture(("full", "piecewise"), PLENTY, lambda: FakeCapture(spoil(runner)))
    graphs = runner.graphs
    assert graphs.kinds == "piecewise"
    assert [graph.size.tokens for graph in graphs.decodes + graphs.others] == [1, 2, 3, 16, 32, 40]
    missed = [what for what, _ in graphs.dropped if "piecewise" not in what]
    assert {f"{what}, full" for what in SIZES + DECODES} <= set(missed)
    assert runner.counts.dropped[reason] == len(graphs.dropped) == len(caplog.records)
    assert words in caplog.messages[0]
    runner.capture(("piecewise",), PLENTY, lambda: FakeCapture(lambda kind, replay: lambda: None))
    assert (len(runner.graphs), runner.graphs.kinds) == (0, "off")
    assert runner.counts.dropped["check"] == 12


@pytest.mark.parametrize("spoil", [wrong, stale, failing])
def test_full_is_an_order(runner: ModelRunner, spoil: Any) -> None:
    with pytest.raises(ConfigError, match="graphs cannot be full: 3 tokens of 3 rows"):
        runner.capture(("full",), PLENTY, lambda: FakeCapture(spoil(runner)))


def test_graphs_stop_where_their_memory_ends(runner: ModelRunner) -> None:
    runner.capture(("full", "piecewise"), 1000, lambda: FakeCapture(bytes_each=100))
    graphs = runner.graphs
    assert len(graphs) == 10
    # single tokens and heads come first; of the others the largest
    assert [graph.size.tokens for graph in graphs.others] == [40]
    assert [what for what, _ in graphs.dropped] == [f"{SIZES[1]}, and all that are smaller"]
    assert runner.counts.dropped == {"memory": 1}
    assert graphs.num_bytes == 1000
    with pytest.raises(ConfigError, match="kept for graphs are used"):
        runner.capture(("full",), 1000, lambda: FakeCapture(bytes_each=100))


def test_checks_see_what_leaks_from_padding(runner: ModelRunner) -> None:
    """Who reads a row of padding, or a page that is not the row's, is found out."""
    forward = runner.forward

    def leak(size: Any, *rest: Any) -> Any:
        out = forward(size, *rest)
        kv = runner.kv.layers[-1]
        if size.tokens == 32:
            runner.picked[0] += 0.0 * kv.k_pages[: kv.k_pages.shape[0] // 2].sum()
        return out

    runner.forward = leak  # type: ignore[method-assign]
    runner.capture(("full", "piecewise"), PLENTY, FakeCapture)
    assert [what for what, _ in runner.graphs.dropped] == [f"{SIZES[1]}, full", f"{SIZES[1]}, piecewise"]
    assert "are no numbers" in runner.graphs.dropped[0][1]


def test_checks_leave_no_trace(folder: Path) -> None:
    """After them everything is as it was made."""
    fresh, used = (rig.Rig(folder, max_num_batched_tokens=40, max_num_seqs=3).runner for _ in range(2))
    for runner in (fresh, used):
        for kv in runner.kv.layers:
            kv.k_pages.zero_()
            kv.v_pages.zero_()
    used.capture(("full",), PLENTY, FakeCapture)
    for one, other in zip(fresh.kv.layers, used.kv.layers, strict=True):
        assert torch.equal(one.k_pages, other.k_pages)
        assert torch.equal(one.v_pages, other.v_pages)
    for name in ("picked", "tokens"):
        assert torch.equal(getattr(fresh, name), getattr(used, name))


def test_compare_is_bit_by_bit() -> None:
    want = [torch.tensor([1, 2]), torch.tensor([0.5, 1.0])]
    assert compare(want, [t.clone() for t in want]) == ""
    got = [want[0], torch.tensor([0.5, 1.0 + 2**-23])]
    assert compare(want, got).startswith(
        "output 1 is not the eager run's in 1 of 2 values, by up to 1.19e-07"
    )
    assert "output 0" in compare(want, [torch.tensor([1, 3]), want[1]])
    nan = torch.tensor([0.5, float("nan")])
    assert "inf" in compare(want, [want[0], nan])
    assert "no numbers" in compare([nan], [nan])


# ---- answers


PROMPTS = [
    "a short one",
    "Once upon a time there was a list of numbers: " + ", ".join(map(str, range(40))),
    "z",
    "Where is it? " * 9,
]
GREEDY = {"temperature": 0.0, "max_tokens": 9, "ignore_eos": True, "logprobs": 2}
PLAIN = {"temperature": 0.0, "max_tokens": 9, "ignore_eos": True}
PARAMS: list[dict[str, Any]] = [
    GREEDY,
    PLAIN,
    PLAIN | {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 1},
    PLAIN | {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 2},
    PLAIN | {"logit_bias": {70: 2.0}, "repetition_penalty": 1.2},
    PLAIN | {"min_tokens": 3, "ignore_eos": False, "prompt_logprobs": 1},
]


def answers(llm: LLM) -> Iterator[list[RequestOutput]]:
    picture = tiny.picture(200, 300)
    shown = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}
    ]
    for params in PARAMS:
        given = [SamplingParams(**params)] * len(PROMPTS)
        yield llm.generate(PROMPTS, given, use_tqdm=False)
    mixed = [SamplingParams(**PARAMS[i % len(PARAMS)]) for i in range(8)]
    yield llm.generate(PROMPTS * 2, mixed, use_tqdm=False)
    if llm.files.plan.vision is None:
        return
    yield llm.chat(
        [shown, shown], SamplingParams(**GREEDY), mm_processor_kwargs={"max_soft_tokens": 70}, use_tqdm=False
    )


def bits(output: RequestOutput) -> Any:
    answer = output.outputs[0]
    return answer.token_ids, answer.logprobs, output.prompt_logprobs


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_answers_do_not_change_by_a_bit(kind: str, tmp_path: Path) -> None:
    """Padded steps, one after another in the same memory, against steps as they come."""
    rig.save(tmp_path, kind, text_only=kind == "dense")
    settings: dict[str, Any] = {
        "device": "cpu",
        "deterministic": True,
        "max_num_seqs": 5,
        "max_num_batched_tokens": 72,
        "max_model_len": 400,
        "kv_bytes": 8 << 20,
    }
    eager, captured = (LLM(str(tmp_path), **settings) for _ in range(2))
    runner: Any = captured._engine.runner
    runner.capture(("full",), PLENTY, FakeCapture)
    for want, got in zip(answers(eager), answers(captured), strict=True):
        assert [bits(output) for output in got] == [bits(output) for output in want]
    stats = captured.stats()
    assert stats.graph_replays["full"] > 50
    assert stats.graph_replays["head"] > 20
    assert (stats.graph_replays.get("encoder", 0) > 0) == (kind == "moe")
    assert set(stats.eager_forwards) == {"prompt logprobs", "head: rules of requests", "head: top_k"}
    assert stats.graph_replays["full"] + stats.eager_forwards["prompt logprobs"] == stats.steps
    assert eager.stats().eager_forwards == {"no graphs": eager.stats().steps}


def test_pictures_in_larger_graphs_are_the_same_pictures(tmp_path: Path) -> None:
    """Whatever larger ones were there before, and with room behind for more patches and more pictures."""
    rig.save(tmp_path, "dense")
    runner = rig.Rig(tmp_path, deterministic=True, max_num_seqs=2).runner
    media = runner.soft
    large, small, wide = (
        rig.picture(*size, 70, seed).patches for seed, size in enumerate([(400, 400), (60, 200), (100, 900)])
    )
    with torch.inference_mode():
        for pictures, count in (([large, wide], 1260), ([small], 630), ([small, large, small], 1890)):
            patches = pack(pictures, runner.device)
            assert len(patches.pixels) < count
            want = runner.model.encode_images(patches)
            media.inputs.pixels.random_(0, 256)
            media.inputs.soft.fill_(float("nan"))
            media.inputs.fill(pictures)
            assert int(media.inputs.patches(count).cells.max()) < len(patches.pixels)
            media.run(count)
            assert torch.equal(media.inputs.soft[: len(want)], want)


def test_pictures_take_the_smallest_graph_that_holds_them() -> None:
    counts = encoder_sizes()
    assert counts == sorted(set(counts))
    assert (counts[-1], MOST_CAPTURED // 2 in counts) == (MOST_CAPTURED, True)
    assert all(count % 9 == 0 for count in counts)
    replays = {count: (lambda: None) for count in counts}
    graphs = Graphs(encoders=dict(replays))
    assert graphs.find_encoder(1, 2520) is replays[2520]
    assert graphs.find_encoder(2, 2521) is replays[3150]
    assert graphs.find_encoder(PICTURES, 315) is replays[315]
    assert graphs.find_encoder(PICTURES + 1, 315) is None
    assert graphs.find_encoder(1, MOST_CAPTURED + 9) is None
    assert graphs.counts.replays == {"encoder": 3}
    assert graphs.counts.eager == {"encoder: no graph of this size": 2}
    assert Graphs().find_encoder(1, 9) is None


# ---- the recorder


class FakeGraph:
    """torch.cuda.CUDAGraph as far as the recorder knows it; `log` says what happened in which order."""

    log: ClassVar[list[str]] = []
    pools: ClassVar[list[Any]] = []

    def capture_begin(self, *, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.pools.append(pool)
        self.log.append("begin")

    def capture_end(self) -> None:
        self.log.append("end")

    def replay(self) -> None:
        self.log.append("replay")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    handles = iter(range(100))
    FakeGraph.log, FakeGraph.pools = [], []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(capture, "borrow", lambda tensor: tensor)
    return Recorder(torch.device("cuda"))


def test_pieces_are_cut_at_the_attention_calls(
    runner: ModelRunner, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = decode_sizes(1, runner.tables.width)[0]
    calls: list[tuple[int, ...]] = []

    def attend(q: torch.Tensor, *rest: Any, **settings: Any) -> torch.Tensor:
        FakeGraph.log.append("attend")
        calls.append(tuple(q.shape))
        return torch.full_like(q, 2.0)

    monkeypatch.setattr(capture, "paged_attention", attend)
    replay = recorder.piecewise(lambda attend: runner.forward(size, attend))
    layers = len(runner.decoder.layers)
    assert FakeGraph.log == ["begin", *["end", "begin"] * layers, "end"]
    assert not calls, "attention does not run while its inputs are not computed"
    assert set(FakeGraph.pools) == {0}
    FakeGraph.log.clear()
    replay()
    assert FakeGraph.log == ["replay", *["attend", "replay"] * layers]
    assert calls == [(1, 4, 16)] * 5 + [(1, 4, 32)]


def test_a_whole_run_is_one_graph(recorder: Recorder) -> None:
    seen: list[Any] = []
    replay = recorder.full(seen.append)
    assert seen == [capture.paged_attention]
    replay()
    assert FakeGraph.log == ["begin", "end", "replay"]


def test_a_capture_that_breaks_is_ended_and_its_pool_left_alone(recorder: Recorder) -> None:
    def broken(attend: Any) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        recorder.full(broken)
    assert FakeGraph.log == ["begin", "end"]
    recorder.full(lambda attend: None)
    assert FakeGraph.pools == [0, 1]


def test_random_steps_are_of_all_kinds(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with and without a past, prompts beside single tokens, ids that come from the device."""
    rows: list[Row] = []
    enter = runner.tables.enter
    monkeypatch.setattr(runner.tables, "enter", lambda seats, new: (rows.extend(new), enter(seats, new)))
    runner.capture(("full",), PLENTY, FakeCapture)
    assert {row.start == 0 for row in rows} == {True, False}
    assert {row.count == 1 for row in rows} == {True, False}
    assert {row.token_ids is None for row in rows} == {True, False}
    assert len({row.slot for row in rows}) == 3
    assert max(row.start + row.count for row in rows) <= 100
