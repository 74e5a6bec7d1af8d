"""Sizes of embed: with and without soft tokens."""

from __future__ import annotations

from typing import Any

import torch

from gemcut.kernels.case import Case, MakeInputs, normal
from gemcut.kernels.embed.op import embed

VOCAB = 4096  # enough to gather a few rows from
LARGE_VOCAB = 65536  # 369 MB at H = 2816: many rows do not come from L2


def _inputs(count: int, hidden: int, soft: int, ids: torch.dtype) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        draw = normal(generator, device, dtype)
        vocab = LARGE_VOCAB if count > 1024 else VOCAB
        soft_rows = None
        if soft:
            soft_rows = torch.full((count,), -1, dtype=ids, device=device)
            places = torch.randperm(count, generator=generator, device=device)[:soft]
            soft_rows[places] = torch.arange(soft, dtype=ids, device=device)
        return {
            "token_ids": torch.randint(vocab, (count,), generator=generator, device=device, dtype=ids),
            "weight": draw(vocab, hidden, scale=0.05),
            "soft": draw(soft, hidden) if soft else None,
            "soft_rows": soft_rows,
            "next_weight": draw(hidden, scale=0.3, shift=1.0),
            "eps": 1e-6,
        }

    return make


def _case(
    count: int, hidden: int, soft: int = 0, ids: torch.dtype = torch.int64, full_size: bool = False
) -> Case:
    return Case(
        name=f"T={count} H={hidden} soft={soft}",
        operation=embed,
        make_inputs=_inputs(count, hidden, soft, ids),
        outputs=("x", "h"),
        exact=("x",),
        bytes=2 * hidden * (3 * count + 1) + count * ids.itemsize * (2 if soft else 1),
        full_size=full_size,
    )


CASES = (
    _case(1, 48),
    _case(7, 128, ids=torch.int32),
    _case(9, 48, soft=4),
    _case(3, 2816, soft=1, ids=torch.int32),
    _case(2, 5376),
    *(_case(count, 2816, full_size=True) for count in (1, 64, 8192)),
    _case(8192, 2816, soft=2240, full_size=True),
)
