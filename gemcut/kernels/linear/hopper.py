"""The dense product of 2 to 64 rows on Hopper: it reads the weight, and all else hides behind that (Gluon).

A program takes 64 outputs. Their weights are the left operand of the matrix unit, the rows, padded to 8, 16,
32 or 64, the right one; both come by the copy engine through a ring in shared memory. The ring is full of
weights before the kernel that computes the rows is over. Where a weight has too few outputs for all
processors, two programs share a tile, each with half of the inputs. The last to arrive adds the halves up, in
their order whoever that is: what a row gets depends on shapes alone.
"""

# gluon types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from functools import cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gemcut.kernels.overlap import after_previous, is_hopper, overlap

MOST_ROWS = 64
FEWEST_INPUTS = 2048  # measured from 2112 on
TILE, STEP = 64, 128  # outputs and inputs: 16 KB of weights
PROCESSORS, FEWEST_PROGRAMS = 132, 88  # all programs at once, and at least two thirds of an H100 at work


def serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `streamed` serves this product: by its shapes and dtype alone. x: [T, K]; weight: [N, K]."""
    tiles, parts = _divide(weight)
    inputs = weight.shape[1]
    return (
        1 < x.shape[0] <= MOST_ROWS
        and FEWEST_PROGRAMS <= tiles * parts <= PROCESSORS
        and inputs >= FEWEST_INPUTS
        and inputs % 8 == 0  # the copy engine wants rows at multiples of 16 bytes
        and x.element_size() == 2
        and is_hopper(x.device)
    )


def _divide(weight: torch.Tensor) -> tuple[int, int]:
    """(tiles of outputs, parts of each one's sum)."""
    tiles = triton.cdiv(weight.shape[0], TILE)
    return tiles, 2 if 2 * tiles <= PROCESSORS else 1


def streamed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T of a few rows. x: [T, K]; weight: [N, K], as `serves` wants them. Returns [T, N]."""
    count, inputs = x.shape
    outputs = weight.shape[0]
    rows = max(8, triton.next_power_of_2(count))
    tiles, parts = _divide(weight)
    out = x.new_empty(count, outputs)
    partial = arrivals = None
    if parts > 1:
        partial = torch.empty(tiles, parts, rows, TILE, dtype=torch.float32, device=x.device)
        arrivals = _arrivals(weight.data_ptr(), tiles, x.device)
    _streamed[(tiles * parts,)](
        TensorDescriptor.from_tensor(x, [rows, STEP], _layout(rows)),
        TensorDescriptor.from_tensor(weight, [TILE, STEP], _layout(TILE)),
        out,
        partial,
        arrivals,
        count,
        OUTPUTS=outputs,
        INPUTS=inputs,
        PARTS=parts,
        STAGES=9 if rows <= 32 else 7,  # 166 to 229 KB: one program a processor
        num_warps=4,
        **overlap(x.device),
    )
    return out


@cache
def _layout(rows: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, STEP], gl.bfloat16)  # or any type of 16 bits


@cache
def _arrivals(weight: int, tiles: int, device: torch.device) -> torch.Tensor:
    """Zeros: one counter a tile of the weight that lies at this address. The last to arrive sets it back.

    Launches with one weight must follow one another; those with two may overlap.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a streamed product must have run once before it is captured")
    return torch.zeros(tiles, dtype=torch.int32, device=device)


@gluon.jit(do_not_specialize=["count"])
def _streamed(
    x_desc,
    weight_desc,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    count,
    OUTPUTS: gl.constexpr,
    INPUTS: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
    num_warps: gl.constexpr,
):
    TILE: gl.constexpr = weight_desc.block_type.shape[0]
    STEP: gl.constexpr = weight_desc.block_type.shape[1]
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    STEPS: gl.constexpr = (INPUTS + STEP - 1) // STEP
    BYTES: gl.constexpr = weight_desc.block_type.nbytes + x_desc.block_type.nbytes
    tile = gl.program_id(0) // PARTS
    part = gl.program_id(0) % PARTS
    first = part * STEPS // PARTS
    steps = (part + 1) * STEPS // PARTS - first
    # what lies outside of a tensor arrives as zeros
    weights = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, TILE, STEP], weight_desc.layout)
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, ROWS, STEP], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
    fence_async_shared()
    for slot in gl.static_range(STAGES):
        mbarrier.expect(full.index(slot), BYTES, pred=slot < steps)
        at = (first + slot) * STEP
        tma.async_copy_global_to_shared(
            weight_desc, [tile * TILE, at], full.index(slot), weights.index(slot), pred=slot < steps
        )
    after_previous(OVERLAP)
    for slot in gl.static_range(STAGES):
        at = (first + slot) * STEP
        tma.async_copy_global_to_shared(x_desc, [0, at], full.index(slot), xs.index(slot), pred=slot < steps)

    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, ROWS, 16])
    acc = gl.zeros([TILE, ROWS], gl.float32, acc_layout)
    slot = 0
    phase = 0
    for step in range(steps):
        mbarrier.wait(full.index(slot), phase)
        acc = warpgroup_mma(weights.index(slot), xs.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))  # the product before this one is over: its place is free
        free = (slot + STAGES - 1) % STAGES
        following = step - 1 + STAGES
        if (step > 0) & (following < steps):
            at = (first + following) * STEP
            mbarrier.expect(full.index(free), BYTES)
            tma.async_copy_global_to_shared(
                weight_desc, [tile * TILE, at], full.index(free), weights.index(free)
            )
            tma.async_copy_global_to_shared(x_desc, [0, at], full.index(free), xs.index(free))
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1
    acc = warpgroup_mma_wait(0, deps=(acc,))

    WIDE: gl.constexpr = 4 if ROWS == 8 else 8  # outputs a thread
    out_layout: gl.constexpr = gl.BlockedLayout(
        [1, WIDE], [32 * WIDE // TILE, TILE // WIDE], [num_warps, 1], [1, 0]
    )
    row = gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))[:, None]
    column = gl.arange(0, TILE, gl.SliceLayout(0, out_layout))[None, :]
    at = out_ptr + row * OUTPUTS + tile * TILE + column
    stored = (row < count) & (tile * TILE + column < OUTPUTS)
    if PARTS == 1:
        result = gl.convert_layout(acc.to(out_ptr.dtype.element_ty).permute((1, 0)), out_layout)
        gl.store(at, result, mask=stored)
    else:
        whole = partial_ptr + tile * (PARTS * ROWS * TILE)
        i = gl.arange(0, TILE, gl.SliceLayout(1, acc_layout))[:, None]
        j = gl.arange(0, ROWS, gl.SliceLayout(0, acc_layout))[None, :]
        gl.store(whole + part * (ROWS * TILE) + j * TILE + i, acc)
        gl.thread_barrier()  # all threads' stores come before the arrival that publishes them
        arrived = gl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel")
        if arrived == PARTS - 1:
            gl.thread_barrier()
            # .cg: past this multiprocessor's L1, which other programs' stores do not reach
            total = gl.load(whole + row * TILE + column, cache_modifier=".cg")
            for other in gl.static_range(1, PARTS):
                total += gl.load(whole + other * (ROWS * TILE) + row * TILE + column, cache_modifier=".cg")
            gl.store(at, total.to(out_ptr.dtype.element_ty), mask=stored)
            gl.store(arrivals_ptr + tile, 0)
