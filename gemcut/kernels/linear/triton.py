"""The dense product where cuBLAS is not the best there is.

`linear` has one tile shape for every number of rows: what a row gets does not depend on the batch around it.
Slower than cuBLAS, which chooses a kernel by shape; only deterministic mode comes here. `single` takes one
row: it only reads the weight, and asks for it before the kernel that computes the row is over.
"""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemcut.kernels.overlap import after_previous, overlap

SINGLE_N, SINGLE_K = 8, 1024  # 16 KB of weight a program and step: 4 loads of 16 bytes a thread


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


def single(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T of one row. x: [1, K]; weight: [N, K]. Returns [1, N]."""
    outputs, inputs = weight.shape
    out = x.new_empty(1, outputs)
    _single[(triton.cdiv(outputs, SINGLE_N),)](
        x,
        weight,
        out,
        OUTPUTS=outputs,
        INPUTS=inputs,
        BLOCK_N=SINGLE_N,
        BLOCK_K=min(SINGLE_K, triton.next_power_of_2(inputs)),
        num_warps=4,
        **overlap(x.device),
    )
    return out


@triton.jit
def _weights(weight_at, k, start, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] fp32. Read once a step and by nobody else: they need no place in L2."""
    if INPUTS - start >= BLOCK_K:
        weight = tl.load(weight_at + start, eviction_policy="evict_first")
    else:
        inside = (k < INPUTS - start)[None, :]
        weight = tl.load(weight_at + start, mask=inside, other=0.0, eviction_policy="evict_first")
    return weight.to(tl.float32)


@triton.jit
def _single(
    x_ptr,
    weight_ptr,
    out_ptr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # columns behind the end repeat the last one and are not stored
    weight_at = weight_ptr + tl.minimum(columns, OUTPUTS - 1).to(tl.int64)[:, None] * INPUTS + k[None, :]
    weight = _weights(weight_at, k, 0, INPUTS, BLOCK_K)
    after_previous(OVERLAP)
    acc = weight * tl.load(x_ptr + k, k < INPUTS, other=0.0).to(tl.float32)[None, :]
    for start in tl.static_range(BLOCK_K, INPUTS, BLOCK_K):
        x = tl.load(x_ptr + start + k, k < INPUTS - start, other=0.0).to(tl.float32)
        acc += _weights(weight_at, k, start, INPUTS, BLOCK_K) * x[None, :]
    out = tl.sum(acc, 1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + columns, out, mask=columns < OUTPUTS)


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
