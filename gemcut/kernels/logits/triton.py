"""Segment Z on the GPU: the head's product, then one pass for the soft cap and the cast to fp32."""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemcut.kernels.add_norm.triton import rounded
from gemcut.kernels.backend import Backend
from gemcut.kernels.linear.op import linear
from gemcut.kernels.overlap import after_previous, overlap

BLOCK = 2048  # 8 warps of 8 values a thread


@triton.jit
def _tanh(x):
    """tanh to a few ulps: near 0 by its series, elsewhere by the exponential, which would cancel there."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    small = tl.exp(-2 * tl.abs(x))
    ratio = (1 - small) / (1 + small)
    return tl.where(tl.abs(x) < 0.2, series, tl.where(x < 0, -ratio, ratio))


@triton.jit(do_not_specialize=["count"])
def _cap(
    z_ptr, out_ptr, count, softcap,
    V: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    after_previous(OVERLAP)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count.to(tl.int64) * V
    dtype = z_ptr.dtype.element_ty
    z = tl.load(z_ptr + index, mask, other=0.0).to(tl.float32)
    if CAPPED:
        z = rounded(_tanh(rounded(z / softcap, dtype, ROUND)), dtype, ROUND)
        z = rounded(z * softcap, dtype, ROUND)
    tl.store(out_ptr + index, z, mask)


def logits(h: torch.Tensor, weight: torch.Tensor, *, softcap: float | None, backend: Backend) -> torch.Tensor:
    z = linear(h, weight, backend=backend)
    out = torch.empty_like(z, dtype=torch.float32)
    count, vocab = z.shape
    _cap[(triton.cdiv(count * vocab, BLOCK),)](
        z, out, count, softcap or 1.0,
        vocab, softcap is not None, BLOCK, backend.numerics == "reference", num_warps=8, **overlap(h.device),
    )  # fmt: skip
    return out
