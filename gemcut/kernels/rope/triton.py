"""Rotary tables on the GPU, and the rotation that other kernels apply with them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemcut.kernels.add_norm.triton import rounded
from gemcut.kernels.backend import Backend

BLOCK = 1024


@triton.jit
def rotate(low, high, cos, sin, dtype: tl.constexpr, ROUND: tl.constexpr):
    """(low, high) turned by the angle of (cos, sin), all fp32; three roundings with reference numerics."""
    turned_low = rounded(low * cos, dtype, ROUND) + rounded(-high * sin, dtype, ROUND)
    turned_high = rounded(high * cos, dtype, ROUND) + rounded(low * sin, dtype, ROUND)
    return turned_low, turned_high


@triton.jit(do_not_specialize=["size"])
def _rope_table(positions_ptr, inv_freq_ptr, out_ptr, size, A: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    position = tl.load(positions_ptr + index // A, mask, other=0).to(tl.float32)
    angle = position * tl.load(inv_freq_ptr + index % A, mask, other=0.0)
    tl.store(out_ptr + index, tl.cos(angle).to(out_ptr.dtype.element_ty), mask)
    tl.store(out_ptr + size + index, tl.sin(angle).to(out_ptr.dtype.element_ty), mask)


def rope_table(
    positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype, *, backend: Backend
) -> torch.Tensor:
    count, angles = positions.shape[0], inv_freq.shape[0]
    out = torch.empty(2, count, angles, dtype=dtype, device=positions.device)
    size = count * angles
    _rope_table[(triton.cdiv(size, BLOCK),)](positions, inv_freq, out, size, angles, BLOCK, num_warps=4)
    return out
