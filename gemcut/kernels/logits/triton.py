"""The head on the GPU: cuBLAS, then one walk over the logits that caps them and leaves their maxima."""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemcut.kernels.add_norm.triton import rounded
from gemcut.kernels.backend import Backend
from gemcut.kernels.linear.op import linear
from gemcut.kernels.logits.op import BLOCK, num_blocks
from gemcut.kernels.overlap import after_previous, overlap

BLOCKS = 16  # of a program: 8 warps of 8 values a thread


@triton.jit
def _tanh(x):
    """tanh to a few ulps: near 0 by its series, elsewhere by the exponential, which would cancel there."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    small = tl.exp(-2 * tl.abs(x))
    ratio = (1 - small) / (1 + small)
    return tl.where(tl.abs(x) < 0.2, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def _store_maxima(maxima_ptr, logits, index, blocks, first, V: tl.constexpr):
    """logits, index: [BLOCKS, BLOCK], of which those from V on do not count."""
    number = logits == logits
    largest = tl.max(tl.where(number & (index < V), logits, float("-inf")), 1)
    strange = tl.max((~number & (index < V)).to(tl.int32), 1)
    largest = tl.where(strange > 0, float("nan"), largest)
    block = first + tl.arange(0, logits.shape[0])
    tl.store(maxima_ptr + block, largest, block < blocks)


@triton.jit
def _cap(
    z_ptr, out_ptr, maxima_ptr, softcap,
    V: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr, ROUND: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    after_previous(OVERLAP)
    ALL: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCKS
    index = (first + tl.arange(0, BLOCKS))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    dtype = z_ptr.dtype.element_ty
    z = tl.load(z_ptr + row * V + index, index < V, other=0.0).to(tl.float32)
    if CAPPED:
        z = rounded(_tanh(rounded(z / softcap, dtype, ROUND)), dtype, ROUND)
        z = rounded(z * softcap, dtype, ROUND)
    tl.store(out_ptr + row * V + index, z, index < V)
    _store_maxima(maxima_ptr + row * ALL, z, index, ALL, first, V)


@triton.jit
def _block_maxima(
    logits_ptr, maxima_ptr, V: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    after_previous(OVERLAP)
    ALL: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCKS
    index = (first + tl.arange(0, BLOCKS))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    logits = tl.load(logits_ptr + row * V + index, index < V, other=0.0)
    _store_maxima(maxima_ptr + row * ALL, logits, index, ALL, first, V)


def logits(
    h: torch.Tensor, weight: torch.Tensor, *, softcap: float | None, backend: Backend
) -> tuple[torch.Tensor, torch.Tensor]:
    z = linear(h, weight, backend=backend)
    out = torch.empty_like(z, dtype=torch.float32)
    rows, vocab = z.shape
    maxima = out.new_empty(rows, num_blocks(vocab))
    _cap[(triton.cdiv(vocab, BLOCKS * BLOCK), rows)](
        z, out, maxima, softcap or 1.0,
        vocab, BLOCKS, BLOCK, softcap is not None, backend.numerics == "reference",
        num_warps=8, **overlap(h.device),
    )  # fmt: skip
    return out, maxima


def block_maxima(logits: torch.Tensor) -> torch.Tensor:
    rows, vocab = logits.shape
    maxima = logits.new_empty(rows, num_blocks(vocab))
    _block_maxima[(triton.cdiv(vocab, BLOCKS * BLOCK), rows)](
        logits, maxima, vocab, BLOCKS, BLOCK, num_warps=8, **overlap(logits.device)
    )
    return maxima
