"""Bytes and FLOPs: the KV table of spec 2.7 and floors that a separate roofline script computed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sizes import SIZES, config

from gemcut.plan import (
    batch_work,
    forward_work,
    kv_bytes,
    kv_bytes_per_token,
    parse_config,
    tower_work,
    weight_bytes,
)
from gemcut.plan.costs import distinct_experts, visible_pairs

MIB, GIB = 1 << 20, 1 << 30
# Measured ceilings of one GPU: bytes/s of a device copy, FLOP/s of an 8192^3 bf16 product.
BANDWIDTH, RATE = 2.992e12, 771.5e12

# bytes per token of one sliding / full layer with its own KV, all sliding layers with a full window,
# all full layers per token, and at 128k tokens (spec 2.7)
KV = {
    "E2B": (1024, 2048, 6 * MIB, 6144, 0.75 * GIB),
    "E4B": (2048, 4096, 20 * MIB, 16384, 2 * GIB),
    "12B": (8192, 2048, 320 * MIB, 16384, 2 * GIB),
    "26B-A4B": (8192, 4096, 200 * MIB, 20480, 2.5 * GIB),
    "31B": (16384, 8192, 800 * MIB, 81920, 10 * GIB),
}


@pytest.mark.parametrize("size", SIZES)
def test_kv_bytes_are_those_of_the_spec(size: str) -> None:
    text = parse_config(config(size)).text
    sliding, full, window_total, full_token, at_128k = KV[size]
    window = text.window
    assert window is not None
    assert kv_bytes_per_token(text, "sliding") == sliding * len(text.owners("sliding"))
    assert kv_bytes_per_token(text, "full") == full * len(text.owners("full")) == full_token
    assert kv_bytes_per_token(text, "sliding") * window == window_total
    assert kv_bytes(text, 1 << 17) == window_total + at_128k
    assert kv_bytes(text, 1 << 17, bytes_per_value=1) * 2 == kv_bytes(text, 1 << 17)
    # short of the window, every layer holds every token
    assert kv_bytes(text, 10) == 10 * (full_token + kv_bytes_per_token(text, "sliding"))
    assert kv_bytes(text, 0) == 0


def test_weight_bytes() -> None:
    assert weight_bytes(parse_config(config("31B"))) == 2 * 31_273_088_876
    assert weight_bytes(parse_config(config("31B")), 1) == 31_273_088_876


@pytest.mark.parametrize(("tokens", "ms"), [(16, 11.47), (256, 17.57), (8192, 81.45)])
def test_prefill_floors_of_26b(tokens: int, ms: float) -> None:
    work = forward_work(parse_config(config("26B-A4B")), 1, tokens, 0)
    assert work.floor_s(BANDWIDTH, RATE) * 1e3 == pytest.approx(ms, abs=0.006)


@pytest.mark.parametrize(("sequences", "ms"), [(1, 2.63), (32, 17.49), (64, 21.74)])
def test_decode_floors_of_26b(sequences: int, ms: float) -> None:
    work = forward_work(parse_config(config("26B-A4B")), sequences, 1, 1024)
    assert work.floor_s(BANDWIDTH, RATE) * 1e3 == pytest.approx(ms, abs=0.006)


def test_experts_that_were_counted_replace_the_worst_case() -> None:
    plan = parse_config(config("26B-A4B"))
    few, many, worst = (
        forward_work(plan, 8, 1, 1024, experts=experts).floor_s(BANDWIDTH, RATE) for experts in (39, 52, None)
    )
    one = 2 * 3 * 2816 * 704 * 30 / BANDWIDTH  # an expert more in each of 30 layers
    assert many - few == pytest.approx(13 * one)
    assert many - worst == pytest.approx((52 - distinct_experts(plan.text.layers[0], 8)) * one)


def test_tower_floor_of_26b() -> None:
    """One picture of 280 tokens is 2,520 patches: 4.6 ms."""
    work = tower_work(parse_config(config("26B-A4B")), 1, 2520)
    assert work.floor_s(BANDWIDTH, RATE) * 1e3 == pytest.approx(4.6, abs=0.06)


@pytest.mark.parametrize(("at_once", "seconds"), [(66, 13.5), (94, 11.4), (128, 9.3), (256, 7.1)])
def test_batch_floors_of_26b(at_once: int, seconds: float) -> None:
    """256 requests of 1,024 tokens in and 128 out."""
    steps = batch_work(parse_config(config("26B-A4B")), 256, 1024, 128, at_once, 8192)
    total = sum(times * work.floor_s(BANDWIDTH, RATE) for times, work in steps)
    assert total == pytest.approx(seconds, abs=0.06)


def test_decode_reads_each_weight_once() -> None:
    """Bytes of a decode step without context: the weight reads of spec 2.6 and a little activation."""
    dense, mixture = (forward_work(parse_config(config(size)), 1, 1, 0) for size in ("31B", "26B-A4B"))
    assert sum(dense.bytes.values()) == pytest.approx(61.4e9, rel=0.002)
    assert sum(mixture.bytes.values()) == pytest.approx(7.64e9, rel=0.002)


def test_experts_touched_lie_between_top_k_and_all() -> None:
    layer = parse_config(config("26B-A4B")).text.layers[0]
    assert distinct_experts(layer, 1) == pytest.approx(8)
    assert distinct_experts(layer, 2) == pytest.approx(15.5)
    assert distinct_experts(layer, 10_000) == pytest.approx(128)
    assert distinct_experts(parse_config(config("31B")).text.layers[0], 1) == 0


@given(st.integers(0, 40), st.integers(0, 40), st.none() | st.integers(1, 30))
def test_visible_pairs_are_counted_exactly(count: int, past: int, window: int | None) -> None:
    queries = range(past, past + count)
    pairs = sum(1 for q in queries for k in range(q + 1) if window is None or k > q - window)
    assert visible_pairs(count, past, window) == pairs


def test_two_chunks_compute_the_pairs_of_one() -> None:
    plan = parse_config(config("31B"))
    whole = forward_work(plan, 1, 3000, 0).flops["attention"]
    chunks = forward_work(plan, 1, 1300, 0).flops["attention"]
    chunks += forward_work(plan, 1, 1700, 1300).flops["attention"]
    assert whole == chunks
