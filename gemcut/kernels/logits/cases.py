"""The head with and without a soft cap: a tiny vocabulary, and that of 26B-A4B."""

from __future__ import annotations

from typing import Any

import torch

from gemcut.kernels.case import Case, MakeInputs, normal
from gemcut.kernels.logits.op import BLOCK, block_maxima, logits


def _inputs(count: int, hidden: int, vocab: int, softcap: float | None) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        draw = normal(generator, device, dtype)
        h = draw(count, hidden)
        if count > 1:
            h[-1] = float("nan")  # a row of padding
        # logits up to about 100: from the straight part of the soft cap to its flat ends
        return {"h": h, "weight": draw(vocab, hidden, scale=30.0 / hidden**0.5), "softcap": softcap}

    return make


def _case(count: int, hidden: int, vocab: int, softcap: float | None = 30.0, full_size: bool = False) -> Case:
    return Case(
        name=f"R={count} H={hidden} V={vocab} softcap={softcap}",
        operation=logits,
        make_inputs=_inputs(count, hidden, vocab, softcap),
        outputs=("logits", "maxima"),
        # the product's own output is written and read once more
        bytes=2 * hidden * (count + vocab) + (2 + 2 + 4) * count * vocab + 4 * count * vocab // BLOCK,
        flops=2 * count * hidden * vocab,
        full_size=full_size,
        flips=2e-2,  # the product's order of summation shows where the cap's steps are coarse
    )


def _maxima_inputs(count: int, vocab: int) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        values = normal(generator, device, torch.float32)(count, vocab, scale=10.0)
        values[0, : 2 * BLOCK] = float("-inf")  # a whole block is banned
        values[-1, vocab // 2] = float("nan")
        return {"logits": values}

    return make


def _maxima_case(count: int, vocab: int, full_size: bool = False) -> Case:
    return Case(
        name=f"R={count} V={vocab}",
        operation=block_maxima,
        make_inputs=_maxima_inputs(count, vocab),
        outputs=("maxima",),
        exact=("maxima",),
        bytes=4 * count * (vocab + vocab // BLOCK),
        full_size=full_size,
        numerics=("reference",),
    )


CASES = (
    _case(1, 48, 320),
    _case(3, 48, 320),
    _case(3, 64, 100, softcap=None),
    *(_case(count, 2816, 262144, full_size=True) for count in (1, 64)),
    _maxima_case(2, 300),
    _maxima_case(3, 9000),
    *(_maxima_case(count, 262144, full_size=True) for count in (1, 64)),
)
