"""Segment C on the GPU: one program a row, which lies in registers between its reductions.

Also holds what every kernel over whole rows shares: the norm, the place of roundings, the launch shape.
"""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemcut.kernels.backend import Backend
from gemcut.kernels.overlap import after_previous, overlap


def row_shape(hidden: int) -> tuple[int, int]:
    """(columns padded to a power of two, warps) of a program that holds a whole row.

    16 values a thread: two 16-byte loads of each half-precision input are in flight before the first
    reduction, and 8 programs of 2816 columns share a multiprocessor.
    """
    block = triton.next_power_of_2(hidden)
    return block, max(1, min(16, block // 512))


@triton.jit
def rounded(x, dtype: tl.constexpr, ROUND: tl.constexpr):
    """x as fp32; with reference numerics, through the dtype that the reference holds it in here."""
    if ROUND:
        x = x.to(dtype).to(tl.float32)
    return x


def fuses(backend: Backend) -> bool:
    """Whether a product and the sum after it may share one rounding: `enable_fp_fusion` of a launch.

    The compiler narrows a rounded product of two bf16 values to bf16 and then fuses it with a bf16 sum, as if
    `rounded` were not there. Kernels that add rounded products must say no with reference numerics.
    """
    return backend.numerics != "reference"


@triton.jit
def rms(x, eps, H: tl.constexpr):
    """(mean(x^2) + eps)^-1/2 of an fp32 row; columns beyond H must be 0."""
    return tl.rsqrt(tl.sum(x * x, 0) / H + eps)


@triton.jit
def load_row(pointer, columns, mask):
    return tl.load(pointer + columns, mask, other=0.0).to(tl.float32)


@triton.jit
def _add_norm(
    x_ptr, a_ptr, post_ptr, next_ptr, x1_ptr, h_ptr, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * H
    columns = tl.arange(0, BLOCK)
    mask = columns < H
    dtype = x1_ptr.dtype.element_ty
    post = load_row(post_ptr, columns, mask)
    following = load_row(next_ptr, columns, mask)
    after_previous(OVERLAP)
    a = load_row(a_ptr + start, columns, mask)
    x = load_row(x_ptr + start, columns, mask)
    x1 = rounded(x + rounded(a * rms(a, eps, H) * post, dtype, ROUND), dtype, ROUND)
    tl.store(x1_ptr + start + columns, x1.to(dtype), mask)
    tl.store(h_ptr + start + columns, (x1 * rms(x1, eps, H) * following).to(dtype), mask)


@triton.jit
def _add_norm_moe(
    x_ptr, a_ptr, post_ptr, next_ptr, scale_ptr, expert_ptr, x1_ptr, h_ptr, r_ptr, e_ptr, eps, root,
    H: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr, ROUND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * H
    columns = tl.arange(0, BLOCK)
    mask = columns < H
    dtype = x1_ptr.dtype.element_ty
    post = load_row(post_ptr, columns, mask)
    if EARLY:
        following = load_row(next_ptr, columns, mask)
        scale = load_row(scale_ptr, columns, mask)
        expert = load_row(expert_ptr, columns, mask)
    after_previous(OVERLAP)
    a = load_row(a_ptr + start, columns, mask)
    x = load_row(x_ptr + start, columns, mask)
    x1 = rounded(x + rounded(a * rms(a, eps, H) * post, dtype, ROUND), dtype, ROUND)
    tl.store(x1_ptr + start + columns, x1.to(dtype), mask)
    normed = x1 * rms(x1, eps, H)
    if not EARLY:
        following = load_row(next_ptr, columns, mask)
        scale = load_row(scale_ptr, columns, mask)
        expert = load_row(expert_ptr, columns, mask)
    tl.store(h_ptr + start + columns, (normed * following).to(dtype), mask)
    tl.store(e_ptr + start + columns, (normed * expert).to(dtype), mask)
    r = rounded(rounded(normed, dtype, ROUND) * scale, dtype, ROUND) * root
    tl.store(r_ptr + start + columns, r.to(dtype), mask)


def add_norm(
    x: torch.Tensor,
    a: torch.Tensor,
    post_weight: torch.Tensor,
    next_weight: torch.Tensor,
    *,
    eps: float,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    count, hidden = x.shape
    block, warps = row_shape(hidden)
    x1, h = torch.empty_like(x), torch.empty_like(x)
    _add_norm[(count,)](
        x, a, post_weight, next_weight, x1, h, eps,
        hidden, block, backend.numerics == "reference", num_warps=warps, **overlap(x.device),
    )  # fmt: skip
    return x1, h


def add_norm_moe(
    x: torch.Tensor,
    a: torch.Tensor,
    post_weight: torch.Tensor,
    next_weight: torch.Tensor,
    router_scale: torch.Tensor,
    expert_weight: torch.Tensor,
    *,
    eps: float,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    count, hidden = x.shape
    block, warps = row_shape(hidden)
    # few rows: weights come from memory and are asked for first. Many: they lie in L1, and the registers that
    # they would wait in (74 against 50 a thread) decide how many programs a multiprocessor holds
    early = count <= 256
    x1, h, r, e = (torch.empty_like(x) for _ in range(4))
    _add_norm_moe[(count,)](
        x, a, post_weight, next_weight, router_scale, expert_weight, x1, h, r, e, eps, hidden**-0.5,
        hidden, block, early, backend.numerics == "reference", num_warps=warps, **overlap(x.device),
    )  # fmt: skip
    return x1, h, r, e
