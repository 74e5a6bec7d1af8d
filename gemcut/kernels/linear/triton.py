"""The dense product with one tile shape for every number of rows: what a row gets does not depend on the
batch around it. Slower than cuBLAS, which chooses a kernel by shape; only deterministic mode comes here."""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T. x: [T, K]; weight: [N, K]. Returns [T, N]."""
    count, inputs = x.shape
    outputs = weight.shape[0]
    out = x.new_empty(count, outputs)
    if count == 0:
        return out
    # products of fp32 run outside the matrix units: parity, not speed
    block_m, block_n, block_k = (32, 32, 32) if x.element_size() == 4 else (64, 128, 64)
    _linear[(triton.cdiv(count, block_m) * triton.cdiv(outputs, block_n),)](
        x,
        weight,
        out,
        count,
        OUTPUTS=outputs,
        INPUTS=inputs,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=3,
    )
    return out


@triton.jit(do_not_specialize=["count"])
def _linear(
    x_ptr,
    weight_ptr,
    out_ptr,
    count,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    # all rows of one strip of weights side by side: the larger operand is read once
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # rows and columns behind the end repeat the last one and are not stored: the loop needs no masks
    x_at = x_ptr + tl.minimum(rows, count - 1).to(tl.int64)[:, None] * INPUTS + k[None, :]
    weight_at = weight_ptr + tl.minimum(columns, OUTPUTS - 1).to(tl.int64)[None, :] * INPUTS + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, INPUTS, BLOCK_K):
        if INPUTS % BLOCK_K == 0:
            x = tl.load(x_at)
            weight = tl.load(weight_at)
        else:
            x = tl.load(x_at, mask=(k < INPUTS - start)[None, :], other=0.0)
            weight = tl.load(weight_at, mask=(k < INPUTS - start)[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
        x_at += BLOCK_K
        weight_at += BLOCK_K
    at = out_ptr + rows.to(tl.int64)[:, None] * OUTPUTS + columns[None, :]
    tl.store(
        at, acc.to(out_ptr.dtype.element_ty), mask=(rows < count)[:, None] & (columns < OUTPUTS)[None, :]
    )
