"""Segment E on the GPU: one program a row, which lies in registers from the combine to the next norm."""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemcut.kernels.add_norm.triton import load_row, rms, rounded, row_shape
from gemcut.kernels.backend import Backend
from gemcut.kernels.overlap import after_previous, overlap


@triton.jit
def _close(
    x, y, scalar_ptr, next_ptr, x_out_ptr, h_ptr, start, columns, mask, eps,
    H: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """x' = (x + y) * scalar and h = n(x'; next), both stored. y: the last norm's output, fp32."""
    dtype = x_out_ptr.dtype.element_ty
    following = load_row(next_ptr, columns, mask)
    x = rounded(rounded(x + y, dtype, ROUND) * tl.load(scalar_ptr).to(tl.float32), dtype, ROUND)
    tl.store(x_out_ptr + start + columns, x.to(dtype), mask)
    tl.store(h_ptr + start + columns, (x * rms(x, eps, H) * following).to(dtype), mask)


@triton.jit
def _close_layer(
    x_ptr, d_ptr, post_ptr, scalar_ptr, next_ptr, x_out_ptr, h_ptr, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * H
    columns = tl.arange(0, BLOCK)
    mask = columns < H
    dtype = x_out_ptr.dtype.element_ty
    post = load_row(post_ptr, columns, mask)
    after_previous(OVERLAP)
    d = load_row(d_ptr + start, columns, mask)
    x = load_row(x_ptr + start, columns, mask)
    y = rounded(d * rms(d, eps, H) * post, dtype, ROUND)
    _close(x, y, scalar_ptr, next_ptr, x_out_ptr, h_ptr, start, columns, mask, eps, H, ROUND)


@triton.jit
def _close_layer_moe(
    x_ptr, d_ptr, t_ptr, expert_weights_ptr, dense_ptr, moe_ptr, post_ptr, scalar_ptr, next_ptr,
    x_out_ptr, h_ptr, eps,
    H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = row * H
    columns = tl.arange(0, BLOCK)
    mask = columns < H
    dtype = x_out_ptr.dtype.element_ty
    after_previous(OVERLAP)
    e = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):  # slots ascending, in fp32 (spec 2.4)
        weight = tl.load(expert_weights_ptr + row * K + k)
        e += weight * load_row(t_ptr + start * K + k * H, columns, mask)
    e = rounded(e, dtype, ROUND)
    d = load_row(d_ptr + start, columns, mask)
    x = load_row(x_ptr + start, columns, mask)
    dense = load_row(dense_ptr, columns, mask)
    moe = load_row(moe_ptr, columns, mask)
    post = load_row(post_ptr, columns, mask)
    d = rounded(d * rms(d, eps, H) * dense, dtype, ROUND)
    e = rounded(e * rms(e, eps, H) * moe, dtype, ROUND)
    y = rounded(d + e, dtype, ROUND)
    y = rounded(y * rms(y, eps, H) * post, dtype, ROUND)
    _close(x, y, scalar_ptr, next_ptr, x_out_ptr, h_ptr, start, columns, mask, eps, H, ROUND)


def close_layer(
    x: torch.Tensor,
    d: torch.Tensor,
    post_weight: torch.Tensor,
    layer_scalar: torch.Tensor,
    next_weight: torch.Tensor,
    *,
    eps: float,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    count, hidden = x.shape
    block, warps = row_shape(hidden)
    x_out, h = torch.empty_like(x), torch.empty_like(x)
    _close_layer[(count,)](
        x, d, post_weight, layer_scalar, next_weight, x_out, h, eps,
        hidden, block, backend.numerics == "reference", num_warps=warps, **overlap(x.device),
    )  # fmt: skip
    return x_out, h


def close_layer_moe(
    x: torch.Tensor,
    d: torch.Tensor,
    t: torch.Tensor,
    expert_weights: torch.Tensor,
    dense_weight: torch.Tensor,
    moe_weight: torch.Tensor,
    post_weight: torch.Tensor,
    layer_scalar: torch.Tensor,
    next_weight: torch.Tensor,
    *,
    eps: float,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    count, hidden = x.shape
    block, warps = row_shape(hidden)
    x_out, h = torch.empty_like(x), torch.empty_like(x)
    _close_layer_moe[(count,)](
        x, d, t, expert_weights, dense_weight, moe_weight, post_weight, layer_scalar, next_weight,
        x_out, h, eps,
        hidden, t.shape[1], block, backend.numerics == "reference", num_warps=warps, **overlap(x.device),
    )  # fmt: skip
    return x_out, h
