"""The KV cache's sizes: never more bytes than were given, never less room than is promised."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny
import torch
import transformers
from sizes import SIZES, config

from gemcut.errors import ConfigError
from gemcut.plan import TextPlan, kv_bytes_per_token, parse_config
from gemcut.runner.kv import KVPools, PoolSizes

TEXTS = {size: parse_config(config(size)).text for size in SIZES}


def text_of(**changes: Any) -> TextPlan:
    """A tiny text plan with other settings."""
    settings = {**tiny.TEXT, **tiny.KINDS["dense"], **changes}
    return parse_config(transformers.Gemma4TextConfig(**settings).to_dict()).text


TEXTS["tiny"] = text_of()
TEXTS["full layers only"] = text_of(num_hidden_layers=3, layer_types=["full_attention"] * 3)


def settings(seed: int) -> dict[str, int]:
    choose = random.Random(seed)
    return {
        "page_size": choose.choice((1, 4, 16, 64)),
        "value_bytes": choose.choice((2, 4)),
        "max_num_seqs": choose.choice((1, 3, 64, 256)),
        "max_num_batched_tokens": choose.choice((1, 48, 2048, 8192)),
        "max_model_len": choose.choice((5, 500, 8192, 262_144)),
    }


def page_bytes(text: TextPlan, given: dict[str, int]) -> tuple[int, int]:
    sliding, full = (
        kv_bytes_per_token(text, kind, given["value_bytes"]) * given["page_size"]
        for kind in ("sliding", "full")
    )
    return sliding, full


@pytest.mark.parametrize("name", TEXTS)
def test_pools_take_what_is_given_and_no_byte_more(name: str) -> None:
    text = TEXTS[name]
    for seed in range(60):
        given = settings(seed)
        sliding, full = page_bytes(text, given)
        budget = int(2 ** random.Random(seed).uniform(10, 37))
        try:
            sizes = PoolSizes.within(text, budget, **given)
        except ConfigError as error:
            refused = str(error)
        else:
            refused = ""
        if refused:
            # not even a page of each kind, the full pool a quarter larger
            assert budget < (sliding + 5 * full // 4 + full if sliding else full)
            assert str(budget) in refused
            continue
        assert sizes.page_size == given["page_size"]
        used = sizes.sliding_pages * sliding + sizes.full_pages * full
        assert used == sizes.bytes(text, given["value_bytes"]) <= budget
        assert (sizes.sliding_pages > 0) == (sliding > 0)
        assert (sizes.full_pages > 0) == (full > 0)
        unlimited = PoolSizes.within(text, 1 << 60, **given)
        assert sizes.sliding_pages <= unlimited.sliding_pages
        assert sizes.full_pages <= unlimited.full_pages
        if sizes.full_pages < unlimited.full_pages:
            assert budget - used < full, "a page more would have fitted"
            if sliding:
                assert sizes.full_pages >= sizes.sliding_pages * 5 // 4
                if sizes.sliding_pages < unlimited.sliding_pages:  # in proportion: neither starves
                    assert sizes.full_pages <= (sizes.sliding_pages + 1) * 5 // 4 + sliding // full + 2


@pytest.mark.parametrize("name", TEXTS)
def test_with_memory_enough_every_batch_of_rows_has_its_pages(name: str) -> None:
    """Any rows that a step may hold, each with the window before its chunk, fit at once."""
    text, choose = TEXTS[name], random.Random(0)
    window = text.window or 0
    for seed in range(40):
        given = settings(seed)
        size, longest = given["page_size"], given["max_model_len"]
        sizes = PoolSizes.within(text, 1 << 60, **given)
        assert sizes.full_pages >= given["max_num_seqs"] * -(-longest // size)
        if not window:
            assert sizes.sliding_pages == 0
            continue
        for _ in range(20):
            left, pages = given["max_num_batched_tokens"], 0
            for _ in range(given["max_num_seqs"]):
                count = min(choose.choice((1, 1, left)), left, longest)
                start = choose.randint(0, longest - max(1, count))
                first = max(0, start - window + 1) // size
                # a row without tokens in this step holds the window of its next token
                pages += (start + max(1, count) - 1) // size - first + 1
                left -= count
            assert pages <= sizes.sliding_pages


def test_pools_are_as_large_as_they_say() -> None:
    for name in ("tiny", "full layers only"):
        text = TEXTS[name]
        sizes = PoolSizes.within(
            text,
            300_000,
            page_size=4,
            value_bytes=2,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            max_model_len=512,
        )
        pools = KVPools(text, sizes, torch.device("cpu"), torch.bfloat16)
        assert len(pools.layers) == len(text.layers)
        tensors = {id(t): t for kv in pools.layers for t in (kv.k_pages, kv.v_pages)}
        assert sum(t.numel() * t.itemsize for t in tensors.values()) == sizes.bytes(text, 2) <= 300_000
        for layer, kv in zip(text.layers, pools.layers, strict=True):
            pages = sizes.sliding_pages if layer.kind == "sliding" else sizes.full_pages
            assert kv.k_pages.shape == kv.v_pages.shape == (pages, 4, layer.kv_heads, layer.head_dim)


def test_layers_that_share_kv_read_their_owners_pages() -> None:
    """E2B's layers 15 to 34 own none: they read layer 13's or 14's (spec 2.3)."""
    text = TEXTS["E2B"]
    sizes = PoolSizes(sliding_pages=1, full_pages=1, page_size=1)
    layers = KVPools(text, sizes, torch.device("cpu"), torch.float32).layers
    assert len({id(kv) for kv in layers}) == 15
    for index in range(15, 35):
        assert layers[index] is layers[14 if text.layers[index].kind == "full" else 13]
