"""The second expert product on Hopper, for many rows: warps that fetch, warps that multiply (Gluon).

A program stays on its multiprocessor and takes one tile of 128 rows and 256 columns after the other. Four
warps have the copy engine fetch rows and weights into a ring of stages; two groups of four multiply 64 rows
each. They meet at two barriers a stage: `full` counts bytes that have come, `empty` the groups that are done
with it. So the next tile is under way while this one is stored, and one group stores while the other
multiplies. A group that has no rows in an expert's last tile lets its stages pass.

The first product is not here: with rows that are gathered this was slower than triton.py (LOG.md).
"""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

from functools import cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gemcut.kernels.overlap import after_previous, is_hopper, overlap
from gemcut.kernels.router.op import Routing

PART = gl.constexpr(64)  # rows of a group of warps
GROUPS = gl.constexpr(2)
BLOCK_M = gl.constexpr(128)
BLOCK_N = gl.constexpr(256)
BLOCK_K = gl.constexpr(64)  # 128 bytes: as wide as a swizzled row of shared memory can be
STAGES = gl.constexpr(4)  # of 48 KB, and 16 KB to turn results round: all the shared memory there is
REGISTERS = 168  # of a thread at the launch: 65,536 over three groups of 128
GROUP_REGISTERS = gl.constexpr(216)  # later: multiplying takes from fetching
FETCH_REGISTERS = gl.constexpr(80)


def serves(weight: torch.Tensor) -> bool:
    """Whether `grouped_rows` takes this weight [E, N, K]: on Hopper, of 16 bits, K a multiple of 64."""
    return is_hopper(weight.device) and weight.element_size() == 2 and weight.shape[2] % BLOCK_K.value == 0


def grouped_rows(m: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, routing: Routing) -> None:
    """out [T * K, N], by pair, of m [T * K, I], by place in `routing.order`; weight [E, N, I]."""
    pairs, (experts, width, inputs) = m.shape[0], weight.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    # every expert that has rows may end in a tile that is not full
    tiles = min(pairs, triton.cdiv(pairs, BLOCK_M.value) + experts)
    programs = min(_processors(m.device), tiles * triton.cdiv(width, BLOCK_N.value))
    _grouped_rows[(programs,)](
        TensorDescriptor.from_tensor(m, [PART.value, BLOCK_K.value], layout),
        TensorDescriptor.from_tensor(weight.view(-1, inputs), [BLOCK_N.value, BLOCK_K.value], layout),
        out,
        routing.order,
        routing.offsets,
        experts,
        WIDTH=width,
        INPUTS=inputs,
        EXPERTS=triton.next_power_of_2(experts),
        num_warps=4,
        maxnreg=REGISTERS,
        **overlap(m.device),
    )


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors; those of an H100 where kernels are only compiled."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@gluon.jit
def _tiles_of(offsets_ptr, expert):
    """(tiles, first row, row behind the last) of an expert."""
    first = gl.load(offsets_ptr + expert).to(gl.int32)
    stop = gl.load(offsets_ptr + expert + 1).to(gl.int32)
    return (stop - first + BLOCK_M - 1) // BLOCK_M, first, stop


@gluon.jit
def _find(offsets_ptr, expert, passed, work, STRIPS: gl.constexpr):
    """Where piece number `work` lies, going on from an earlier one's expert and the tiles passed before it.

    All tiles of a strip of an expert's columns follow each other: they run together and share its weights.
    Returns expert, passed, the tile's first row, the row behind the expert's last, and the strip.
    """
    tiles, first, stop = _tiles_of(offsets_ptr, expert)
    while work >= (passed + tiles) * STRIPS:
        passed += tiles
        expert += 1
        tiles, first, stop = _tiles_of(offsets_ptr, expert)
    place = work - passed * STRIPS
    return expert, passed, first + place % tiles * BLOCK_M, stop, place // tiles


@gluon.jit
def _fetch(rows, weights, offsets_ptr, m, w, full, empty, tiles, WIDTH: gl.constexpr, INPUTS: gl.constexpr):
    """What the fetching warps do. Behind an expert's last row come others, which nobody stores."""
    STRIPS: gl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    expert = gl.to_tensor(0)
    passed = gl.to_tensor(0)
    step = gl.to_tensor(0)
    for work in range(gl.program_id(0), tiles * STRIPS, gl.num_programs(0)):
        expert, passed, first, _, strip = _find(offsets_ptr, expert, passed, work, STRIPS)
        output = expert * WIDTH + strip * BLOCK_N
        for k in range(0, INPUTS, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, GROUPS * rows.block_type.nbytes + weights.block_type.nbytes)
            tma.async_copy_global_to_shared(weights, [output, k], ready, w.index(stage))
            for group in gl.static_range(GROUPS):
                part = m.index(stage * GROUPS + group)
                tma.async_copy_global_to_shared(rows, [first + group * PART, k], ready, part)
            step += 1


@gluon.jit
def _multiply(out_ptr, order_ptr, m, w, full, empty, step, first, stop, column,
              GROUP: gl.constexpr, WIDTH: gl.constexpr, INPUTS: gl.constexpr):  # fmt: skip
    """One group's rows of a tile, first .. stop - 1 and PART at most, from its stages to memory."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc = gl.zeros([PART, BLOCK_N], gl.float32, layout)
    for k in range(INPUTS // BLOCK_K):
        stage = (step + k) % STAGES
        mbarrier.wait(full.index(stage), (step + k) // STAGES & 1)
        weight = w.index(stage).permute((1, 0))
        acc = warpgroup_mma(m.index(stage * GROUPS + GROUP), weight, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))  # the step before this one has been read
        mbarrier.arrive(empty.index((step + k + STAGES - 1) % STAGES), count=1, pred=k > 0)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((step + INPUTS // BLOCK_K - 1) % STAGES), count=1)

    # in halves, which lie in the same threads: the second needs no shared memory of its own
    left, right = gl.split(gl.permute(gl.reshape(acc, [PART, 2, BLOCK_N // 2]), [0, 2, 1]))
    stores: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    place = first + gl.arange(0, PART, gl.SliceLayout(1, stores))
    stored = gl.expand_dims(place < stop, 1)
    pair = gl.load(order_ptr + gl.minimum(place, stop - 1))
    columns = gl.expand_dims(column + gl.arange(0, BLOCK_N // 2, gl.SliceLayout(0, stores)), 0)
    at = out_ptr + gl.expand_dims(pair * WIDTH, 1) + columns
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    if WIDTH % BLOCK_N == 0:
        gl.store(at, gl.convert_layout(left.to(dtype), stores), stored)
        gl.store(at + BLOCK_N // 2, gl.convert_layout(right.to(dtype), stores), stored)
    else:
        gl.store(at, gl.convert_layout(left.to(dtype), stores), stored & (columns < WIDTH))
        inside = stored & (columns < WIDTH - BLOCK_N // 2)
        gl.store(at + BLOCK_N // 2, gl.convert_layout(right.to(dtype), stores), inside)


@gluon.jit
def _consume(out_ptr, order_ptr, offsets_ptr, m, w, full, empty, tiles,
             GROUP: gl.constexpr, WIDTH: gl.constexpr, INPUTS: gl.constexpr):  # fmt: skip
    """What group number GROUP of the multiplying warps does."""
    STRIPS: gl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    expert = gl.to_tensor(0)
    passed = gl.to_tensor(0)
    step = gl.to_tensor(0)
    for work in range(gl.program_id(0), tiles * STRIPS, gl.num_programs(0)):
        expert, passed, first, stop, strip = _find(offsets_ptr, expert, passed, work, STRIPS)
        first += GROUP * PART
        if first < stop:
            _multiply(
                out_ptr, order_ptr, m, w, full, empty, step, first, stop, strip * BLOCK_N,
                GROUP, WIDTH, INPUTS,
            )  # fmt: skip
        else:
            for k in range(INPUTS // BLOCK_K):
                stage = (step + k) % STAGES
                mbarrier.wait(full.index(stage), (step + k) // STAGES & 1)
                mbarrier.arrive(empty.index(stage), count=1)
        step += INPUTS // BLOCK_K


@gluon.jit(do_not_specialize=["experts"])
def _grouped_rows(
    rows,
    weights,
    out_ptr,
    order_ptr,
    offsets_ptr,
    experts,
    WIDTH: gl.constexpr,
    INPUTS: gl.constexpr,
    EXPERTS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """rows, weights: descriptors of m and of all experts' weights below each other."""
    after_previous(OVERLAP)
    m = gl.allocate_shared_memory(rows.dtype, [STAGES * GROUPS, PART, BLOCK_K], rows.layout)
    w = gl.allocate_shared_memory(weights.dtype, [STAGES, BLOCK_N, BLOCK_K], weights.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    index = gl.arange(0, EXPERTS, gl.BlockedLayout([1], [32], [4], [0]))
    begins = gl.load(offsets_ptr + index, mask=index < experts, other=0).to(gl.int32)
    ends = gl.load(offsets_ptr + index + 1, mask=index < experts, other=0).to(gl.int32)
    tiles = gl.sum((ends - begins + BLOCK_M - 1) // BLOCK_M, 0)
    gl.warp_specialize(
        [
            (_consume, (out_ptr, order_ptr, offsets_ptr, m, w, full, empty, tiles, 0, WIDTH, INPUTS)),
            (_consume, (out_ptr, order_ptr, offsets_ptr, m, w, full, empty, tiles, 1, WIDTH, INPUTS)),
            (_fetch, (rows, weights, offsets_ptr, m, w, full, empty, tiles, WIDTH, INPUTS)),
        ],
        [4, 4],
        [GROUP_REGISTERS, FETCH_REGISTERS],
    )
