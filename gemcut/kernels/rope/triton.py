"""Rotary tables on the GPU, and the rotation that other kernels apply with them."""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemcut.kernels.add_norm.triton import rounded
from gemcut.kernels.backend import Backend
from gemcut.kernels.overlap import after_previous, overlap

VALUES = 512  # angles of a program, 4 a thread: sines are long, and a step has few of them


@triton.jit
def rotate(low, high, cos, sin, dtype: tl.constexpr, ROUND: tl.constexpr):
    """(low, high) turned by the angle of (cos, sin), all fp32; three roundings with reference numerics."""
    turned_low = rounded(low * cos, dtype, ROUND) + rounded(-high * sin, dtype, ROUND)
    turned_high = rounded(high * cos, dtype, ROUND) + rounded(low * sin, dtype, ROUND)
    return turned_low, turned_high


@triton.jit(do_not_specialize=["count"])
def _rope_table(
    positions_ptr, inv_freq_ptr, out_ptr, count,
    A: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    after_previous(OVERLAP)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    angle = tl.arange(0, BLOCK)
    position = tl.load(positions_ptr + token, token < count, other=0).to(tl.float32)
    turn = position[:, None] * tl.load(inv_freq_ptr + angle, angle < A, other=0.0)[None, :]
    cos_ptr = out_ptr + token.to(tl.int64)[:, None] * A + angle[None, :]
    sin_ptr = cos_ptr + count.to(tl.int64) * A
    mask = (token < count)[:, None] & (angle < A)[None, :]
    tl.store(cos_ptr, tl.cos(turn).to(out_ptr.dtype.element_ty), mask)
    tl.store(sin_ptr, tl.sin(turn).to(out_ptr.dtype.element_ty), mask)


def rope_table(
    positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype, *, backend: Backend
) -> torch.Tensor:
    count, angles = positions.shape[0], inv_freq.shape[0]
    out = torch.empty(2, count, angles, dtype=dtype, device=positions.device)
    block = triton.next_power_of_2(angles)
    rows = max(1, VALUES // block)
    _rope_table[(triton.cdiv(count, rows),)](
        positions, inv_freq, out, count, angles, rows, block, num_warps=4, **overlap(positions.device)
    )
    return out
