"""Segment D on the GPU: a flat walk over the output, no program knows rows."""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemcut.kernels.add_norm.triton import rounded
from gemcut.kernels.backend import Backend
from gemcut.kernels.overlap import after_previous, overlap

# 4 warps of 8 values a thread: one 16-byte load of gate and of up each; smaller steps fill the chip sooner
BLOCK = 1024


@triton.jit
def gelu_tanh(x):
    """x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), as x * sigmoid(2u): nothing cancels."""
    return x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit(do_not_specialize=["groups"])
def _glu(
    gate_up_ptr, out_ptr, groups,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, ROUND: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    after_previous(OVERLAP)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    mask = (group < groups)[:, None]
    row = (group // (WIDTH // GROUP)).to(tl.int64)  # gate_up of a long prefill can pass 2^31 values
    inside = group[:, None] % (WIDTH // GROUP) * GROUP + tl.arange(0, GROUP)[None, :]
    source = gate_up_ptr + row[:, None] * (2 * WIDTH) + inside
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(source, mask, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask, other=0.0).to(tl.float32)
    out = rounded(gelu_tanh(gate), dtype, ROUND) * up
    tl.store(out_ptr + row[:, None] * WIDTH + inside, out.to(dtype), mask)


def glu(gate_up: torch.Tensor, *, backend: Backend) -> torch.Tensor:
    count, columns = gate_up.shape
    width = columns // 2
    out = gate_up.new_empty(count, width)
    # groups of a power of two within a row: the flat walk keeps wide loads and no lane idles at a row's end
    group = min(BLOCK, width & -width)
    groups = count * (width // group)
    _glu[(triton.cdiv(groups * group, BLOCK),)](
        gate_up, out, groups, width, group, BLOCK // group, backend.numerics == "reference", num_warps=4,
        **overlap(gate_up.device),
    )  # fmt: skip
    return out
