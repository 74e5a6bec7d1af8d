"""Each subject measured on a tiny model: rows, shares, and what a table shows of them."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

import pytest

from gemcut.bench import batch, decode, memory, prefill, profile, vision
from gemcut.bench.contender import Gemcut, text_prompt
from gemcut.bench.experts import ExpertCounter
from gemcut.bench.records import rounded
from gemcut.bench.roofline import Roofline
from gemcut.bench.timing import Ceilings, Times
from gemcut.plan import kv_bytes_per_token

SLOW = Ceilings(copy_bytes=1e9, matrix_flops=1e9)


@pytest.fixture(scope="module")
def roofline(moe: Gemcut) -> Roofline:
    return Roofline(moe.plan, SLOW, 4)


def plain(rows: list[Any]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def test_prefill(moe: Gemcut, roofline: Roofline) -> None:
    rows = prefill.measure([moe], roofline, (8, 32), rounds=2)
    assert [row.tokens for row in rows] == [8, 32]
    for row in rows:
        assert row.wall.p20 <= row.wall.median <= row.wall.p80
        assert row.share == row.floor / row.wall.median
        assert row.device is None
    table = prefill.table(plain(rows))
    assert table.rows[1][:2] == ("32", "gemcut")
    assert all(len(cells) == len(table.header) for cells in table.rows)


def test_decode_counts_experts_into_its_floor(moe: Gemcut, roofline: Roofline) -> None:
    notes: list[str] = []
    rows = decode.measure([moe], roofline, (1, 4), 2, note=notes.append, cached=24, new_tokens=6)
    assert notes == []
    assert [row.batch for row in rows] == [1, 4]
    assert rows[0].experts == 2  # one token goes to its top k
    assert rows[1].experts is not None
    assert 2 < rows[1].experts <= 8
    assert rows[1].floor == roofline.decode_ms(4, 24, rows[1].experts) != roofline.decode_ms(4, 24)
    assert all(
        len(cells) == len(decode.table(plain(rows)).header) for cells in decode.table(plain(rows)).rows
    )


def test_a_batch_that_does_not_fit_is_left_out_and_said(moe: Gemcut, roofline: Roofline) -> None:
    notes: list[str] = []
    rows = decode.measure([moe], roofline, (9, 1), 1, note=notes.append, cached=24, new_tokens=4)
    assert [row.batch for row in rows] == [1]
    assert notes == ["gemcut: a batch of 9 does not fit, 8 sequences of 24 tokens ran at once"]


def test_twins_touch_the_experts_of_one(moe: Gemcut) -> None:
    """Three times the same sequence goes to the experts of one; others to more."""
    counter = ExpertCounter([moe])
    prompt = text_prompt(moe.plan, 20, seed=0)
    (answer,) = moe.generate([prompt], 6).answers
    assert counter.distinct([prompt] * 3, [answer] * 3) == 2
    others = [text_prompt(moe.plan, 20, seed=i) for i in range(3)]
    answers = moe.generate(others, 6).answers
    assert 2 < (counter.distinct(others, answers) or 0) <= 6
    counter.close()


def test_batch(moe: Gemcut, roofline: Roofline) -> None:
    notes: list[str] = []
    (row,) = batch.measure([moe], roofline, 1, note=notes.append, requests=11, prompt=16, answer=4)
    assert (row.at_once, row.preemptions, notes) == (8, 0, [])
    assert row.tokens_per_s == pytest.approx(44 / row.wall.median)
    assert row.floor == roofline.batch_s(11, 16, 4, 8, moe.config.max_num_batched_tokens)
    assert batch.table(plain([row])).rows[0][0] == "11 x 16 + 4"


def test_vision(moe: Gemcut, roofline: Roofline) -> None:
    before = len(moe.runner.soft)
    rows = vision.measure([moe], roofline, (1, 2), rounds=1, soft=moe.files.image_tokens)
    assert [(row.what, row.pictures) for row in rows] == [("encode", 1), ("encode", 2), ("first token", 1)]
    assert rows[1].floor > 1.5 * rows[0].floor
    # what was encoded beside the engine is forgotten again; the engine keeps its own, and no first token
    # came from a picture that it had kept
    assert len(moe.runner.soft) == before + vision.WARM_UPS + 1 + vision.DEVICE_ROUNDS


def test_memory(moe: Gemcut) -> None:
    (row,) = memory.measure([moe])
    assert row.weights == row.planned
    limits, text = moe.engine.scheduler.limits, moe.plan.text
    sliding = limits.num_sliding_pages * kv_bytes_per_token(text, "sliding", 4)
    full = limits.num_full_pages * kv_bytes_per_token(text, "full", 4)
    assert row.kv == limits.page_size * (sliding + full)
    assert row.held is None


def test_profile_on_a_cpu(moe: Gemcut, roofline: Roofline) -> None:
    rows = profile.measure([moe], roofline, [("prefill", 16), ("decode", 2)])
    for row in rows:
        assert row.busy == pytest.approx(sum(kernel.time for kernel in row.by_kernel))
        assert any(kernel.name == "aten::mm" for kernel in row.by_kernel)
    assert len(profile.tables(plain(rows))) == 4


def test_times() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    times = Times.of(values)
    assert times.median == 3.0 == statistics.median(values)
    assert times.p20 < times.median < times.p80
    assert Times.of([7.0]) == Times(7.0, 7.0, 7.0)


def test_records_keep_five_digits() -> None:
    assert rounded({"a": [1.23456789, 123456789, None, "x"]}) == {"a": [1.2346, 123456789, None, "x"]}
