"""Sampling: greedy, bounded top-k and unbounded, over a tiny vocabulary and the released one.

Logits lie on a coarse grid, so that ties are everywhere; one row is banned but for a few ids. Where rows are
`flat`, one is all ties, and another has more likely tokens than a list holds.
"""

from __future__ import annotations

from typing import Any

import torch

from gemcut.kernels.backend import Backend
from gemcut.kernels.case import Case, MakeInputs
from gemcut.kernels.logits.op import block_maxima
from gemcut.kernels.sample.op import sample


def _inputs(rows: int, vocab: int, max_top_k: int | None, flat: bool) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        def uniform(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=generator, device=device)

        logits = torch.randn(rows, vocab, generator=generator, device=device) * 4
        logits = (logits * 8).round() / 8
        if flat:
            logits[3] = 1.0
            logits[4] /= 64
        temperature = 0.5 + uniform(rows)
        top_k = torch.full((rows,), vocab, dtype=torch.int64, device=device)
        if max_top_k:
            top_k = torch.randint(1, max_top_k + 1, (rows,), generator=generator, device=device)
            top_k[0] = max_top_k
        if max_top_k == 0:
            temperature.zero_()
        top_p, min_p = 0.5 + 0.5 * uniform(rows), 0.02 * uniform(rows)
        if rows > 2:
            logits[1, torch.randperm(vocab, generator=generator, device=device)[3:]] = float("-inf")
            temperature[2] = 0.0
            top_p[0], min_p[0] = 1.0, 0.0
        draws = torch.rand(rows, generator=generator, device=device, dtype=torch.float64)
        return {
            "logits": logits,
            "maxima": block_maxima(logits, backend=Backend()),
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "uniform": draws,
            "max_top_k": max_top_k,
        }

    return make


def _case(rows: int, vocab: int, max_top_k: int | None, full_size: bool = False, flat: bool = False) -> Case:
    return Case(
        name=f"R={rows} V={vocab} max_top_k={max_top_k}{' flat' * flat}",
        operation=sample,
        make_inputs=_inputs(rows, vocab, max_top_k, flat),
        outputs=("tokens",),
        exact=("tokens",),
        bytes=4 * rows * vocab,
        full_size=full_size,
        numerics=("reference",),
    )


CASES = (
    _case(1, 320, 0),
    _case(5, 9000, 0),
    _case(6, 320, 20),
    _case(4, 9000, 64),
    _case(4, 9000, 1000),
    _case(4, 320, None),
    _case(6, 9000, 64, flat=True),
    _case(6, 9000, 3000, flat=True),
    _case(6, 9000, None, flat=True),
    *(_case(rows, 262144, 0, full_size=True) for rows in (1, 64)),
    *(_case(rows, 262144, 64, full_size=True) for rows in (1, 64)),
    *(_case(rows, 262144, 1024, full_size=True) for rows in (1, 64)),
    *(_case(rows, 262144, None, full_size=True) for rows in (1, 64)),
    *(_case(6, 262144, max_top_k, full_size=True, flat=True) for max_top_k in (64, 1024, None)),
)
