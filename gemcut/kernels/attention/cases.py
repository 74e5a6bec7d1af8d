"""Steps of every shape that the engine makes: prompts, chunks over a cached prefix, decode rows, both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gemcut.kernels.attention.op import paged_attention
from gemcut.kernels.case import Case


@dataclass(frozen=True, slots=True)
class Heads:
    """query heads, KV heads, head size, window."""

    q: int
    kv: int
    size: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """New tokens and keys (new ones included) of a row; vision blocks [begin, end) by position."""

    count: int
    length: int
    blocks: tuple[tuple[int, int], ...] = ()


def make_inputs(
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    *,
    heads: Heads,
    rows: tuple[Row, ...],
    page_size: int,
    padding: int,
    spans: bool,
) -> dict[str, Any]:
    """Pages in random order. What no query may read is NaN or, in page tables, out of every range.

    Scores have a standard deviation of 1: a softmax that is neither flat nor a choice of one key.
    """

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    count = sum(row.count for row in rows)
    longest = max(-(-row.length // page_size) for row in rows) + 1
    owners = [(r, i) for r, row in enumerate(rows) for i in range(-(-row.length // page_size))]
    pool = torch.randperm(len(owners) + 2, generator=generator, device=device)[: len(owners)].tolist()
    shape = len(owners) + 2, page_size, heads.kv, heads.size
    k_pages, v_pages = (normal(*shape).to(dtype) for _ in range(2))
    table = torch.full((len(rows), longest), -1, dtype=torch.int32)
    unread = torch.ones(shape[0], page_size, dtype=torch.bool)
    for (r, i), page in zip(owners, pool, strict=True):
        row = rows[r]
        first = 0
        if heads.window is not None:
            first = max(0, row.length - row.count - heads.window + 1)
        if (i + 1) * page_size <= first:
            table[r, i] = 2**30  # fell out of the window: what was there belongs to another row now
            continue
        table[r, i] = page
        inside = torch.arange(i * page_size, (i + 1) * page_size)
        unread[page] = (inside < first) | (inside >= row.length)
    k_pages[unread] = float("nan")
    v_pages[unread] = float("nan")

    starts = [0]
    blocks = torch.zeros(count + padding, 2, dtype=torch.int32)
    for row in rows:
        for position in range(row.length - row.count, row.length):
            at = starts[-1] + position - row.length + row.count
            blocks[at] = position
            for begin, end in row.blocks:
                if begin <= position < end:
                    blocks[at] = torch.tensor([begin, end])
        starts.append(starts[-1] + row.count)
    q = (normal(count + padding, heads.q, heads.size) * heads.size**-0.5).to(dtype)
    q[count:] = float("nan")
    return {
        "q": q,
        "k_pages": k_pages,
        "v_pages": v_pages,
        "page_table": table.to(device),
        "query_start": torch.tensor(starts, dtype=torch.int32, device=device),
        "seq_lens": torch.tensor([row.length for row in rows], dtype=torch.int32, device=device),
        "spans": blocks.to(device) if spans else None,
        "window": heads.window,
    }


def visible_pairs(row: Row, window: int | None) -> int:
    """(query, key) pairs of a row without vision blocks."""
    first = row.length - row.count
    return sum(min(p + 1, window or p + 1) for p in range(first, row.length))


def case(
    name: str,
    heads: Heads,
    *rows: Row,
    page_size: int = 16,
    padding: int = 0,
    spans: bool = False,
    full_size: bool = False,
) -> Case:
    count = sum(row.count for row in rows)
    keys = sum(min(row.length, row.count + (heads.window or row.length) - 1) for row in rows if row.count)
    pairs = sum(visible_pairs(row, heads.window) for row in rows)
    return Case(
        name=f"{name} D={heads.size} G={heads.q // heads.kv} W={heads.window}",
        operation=paged_attention,
        make_inputs=partial(
            make_inputs, heads=heads, rows=rows, page_size=page_size, padding=padding, spans=spans
        ),
        outputs=("o",),
        bytes=2 * heads.size * (2 * count * heads.q + 2 * keys * heads.kv),
        flops=4 * heads.size * heads.q * pairs,
        full_size=full_size,
        numerics=("reference",),
        flips=None,  # probabilities are rounded before the second product
        # interpreted, in fp32: scores of 256 and more products differ by a few ulps of their own
        tolerance=2.0 if heads.size >= 256 and not full_size else 1.0,
        capturable_reference=False,
    )


TINY_SLIDING = Heads(4, 2, 16, 12)
TINY_FULL = Heads(4, 1, 32)
SLIDING = Heads(4, 2, 256, 40)
FULL = Heads(8, 1, 512)
WIDE_GROUP = Heads(16, 1, 64)
SLIDING_26B = Heads(16, 8, 256, 1024)
FULL_26B = Heads(16, 2, 512)
FULL_12B = Heads(16, 1, 512)
FULL_E4B = Heads(8, 2, 512)

DECODE = (Row(1, 1), Row(1, 40), Row(1, 97))
MIXED = (Row(1, 33), Row(21, 21), Row(0, 0), Row(1, 5), Row(9, 70), Row(2, 2))
MIXED_LARGE = (*MIXED, Row(150, 500), Row(64, 128), Row(300, 300))

CASES = (
    case("one prompt", TINY_SLIDING, Row(37, 37), page_size=16),
    case("one prompt", TINY_FULL, Row(37, 37), page_size=32),
    case("one token", TINY_FULL, Row(1, 1)),
    case("one token in two slots", TINY_FULL, Row(1, 9), Row(0, 0), padding=1),
    case("cached prefix", TINY_SLIDING, Row(11, 75)),
    case("cached prefix", TINY_FULL, Row(11, 75), page_size=64),
    case("mixed", TINY_SLIDING, *MIXED, padding=3),
    case("mixed, pages smaller than a tile", TINY_SLIDING, *MIXED, padding=3, page_size=8),
    case(
        "pictures, pages smaller than a tile",
        TINY_SLIDING,
        Row(40, 52, ((13, 22), (24, 50))),
        spans=True,
        page_size=8,
    ),
    case("mixed", TINY_FULL, *MIXED, padding=3),
    case("mixed", WIDE_GROUP, *MIXED),
    case("mixed, padded to many tiles", TINY_FULL, *MIXED, padding=150),
    case("decode", TINY_SLIDING, *DECODE),
    case("decode", TINY_FULL, *DECODE),
    case("decode", WIDE_GROUP, *DECODE, page_size=32),
    case("decode, padded", TINY_SLIDING, *DECODE, Row(0, 0), Row(0, 0), padding=2),
    case("as many tokens as rows", TINY_FULL, Row(2, 20), Row(0, 0), Row(3, 3), Row(0, 0), Row(0, 0)),
    case("picture", TINY_SLIDING, Row(30, 30, ((4, 24),)), spans=True),
    case("pictures, cached", TINY_SLIDING, Row(40, 52, ((13, 22), (24, 50))), Row(1, 9), spans=True),
    case("picture wider than the window", SLIDING, Row(80, 90, ((20, 85),)), spans=True),
    case("one prompt", SLIDING, Row(150, 150)),
    case("mixed", SLIDING, *MIXED, padding=1),
    case("decode", SLIDING, *DECODE, page_size=64),
    case("one prompt", FULL, Row(70, 70)),
    case("mixed", FULL, *MIXED, padding=1, page_size=64),
    case("decode", FULL, *DECODE),
    *(
        case(f"prefill {count}", heads, Row(count, count), page_size=64, full_size=True)
        for heads in (SLIDING_26B, FULL_26B)
        for count in (256, 1024, 8192)
    ),
    *(
        case(
            "prefill 512 of 4096, twice", heads, Row(512, 4096), Row(512, 4096), page_size=64, full_size=True
        )
        for heads in (SLIDING_26B, FULL_26B)
    ),
    *(
        case("mixed prefill", heads, *MIXED_LARGE, page_size=64, padding=5, full_size=True)
        for heads in (SLIDING_26B, FULL_26B, FULL_12B, FULL_E4B)
    ),
    *(
        case(f"decode {batch}", heads, *[Row(1, 1024)] * batch, page_size=64, full_size=True)
        for heads in (SLIDING_26B, FULL_26B)
        for batch in (1, 8, 32, 64)
    ),
)
