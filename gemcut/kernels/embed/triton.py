"""Segment S0 on the GPU: one program a token, which reads an embedding row or a soft token."""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from gemcut.kernels.add_norm.triton import load_row, rms, rounded, row_shape
from gemcut.kernels.backend import Backend
from gemcut.kernels.overlap import after_previous, overlap


@triton.jit
def _embed(
    ids_ptr, weight_ptr, soft_ptr, soft_rows_ptr, next_ptr, x_ptr, h_ptr, root, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, SOFT: tl.constexpr, ROUND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < H
    dtype = x_ptr.dtype.element_ty
    following = load_row(next_ptr, columns, mask)
    after_previous(OVERLAP)
    source = weight_ptr + tl.load(ids_ptr + row).to(tl.int64) * H
    factor = root
    if SOFT:
        soft = tl.load(soft_rows_ptr + row).to(tl.int64)
        if soft >= 0:
            source = soft_ptr + soft * H
            factor = 1.0
    # times 1.0 is exact: a soft token stays bit for bit, in both numerics
    x = rounded(load_row(source, columns, mask) * factor, dtype, ROUND)
    tl.store(x_ptr + row * H + columns, x.to(dtype), mask)
    tl.store(h_ptr + row * H + columns, (x * rms(x, eps, H) * following).to(dtype), mask)


@cache
def _root(hidden: int, dtype: torch.dtype) -> float:
    """sqrt(H) as the weight's dtype holds it (spec 10, item 1)."""
    return torch.tensor(hidden**0.5, dtype=dtype).item()


def embed(
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    soft: torch.Tensor | None,
    soft_rows: torch.Tensor | None,
    next_weight: torch.Tensor,
    *,
    eps: float,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    count, hidden = token_ids.shape[0], weight.shape[1]
    block, warps = row_shape(hidden)
    x, h = weight.new_empty(count, hidden), weight.new_empty(count, hidden)
    _embed[(count,)](
        token_ids, weight, soft, soft_rows, next_weight, x, h, _root(hidden, weight.dtype), eps,
        hidden, block, soft is not None, backend.numerics == "reference", num_warps=warps,
        **overlap(weight.device),
    )  # fmt: skip
    return x, h
