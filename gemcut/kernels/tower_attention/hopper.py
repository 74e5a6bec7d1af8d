"""Attention within each picture on Hopper, for heads of 65 to 80 dimensions.

Warp groups of 64 queries share the keys and values that one more warp has fetched, step by step into a ring
in shared memory. While one group computes exponentials, another has the matrix units. A head is a part of 64
and one of 16; a product with the second part follows that with the first without waiting for it.
"""

# gluon types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportOptionalSubscript=false, reportOperatorIssue=false, reportAssignmentType=false

from __future__ import annotations

from dataclasses import dataclass
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
from gemcut.kernels.ragged import count_tiles, find_tile
from gemcut.kernels.softmax import soften

MAIN, REST = 64, 16  # dimensions of the two parts of a head
ROWS = gl.constexpr(64)  # queries of a warp group: what its matrix instruction takes
REGISTERS = 65536  # of a processor, all for one program
FETCHING = gl.constexpr(24)  # registers a thread of the warp that fetches: the fewest there can be


@dataclass(frozen=True, slots=True)
class Config:
    """groups: warp groups of a program, 64 queries each. block_n: keys a step. stages: steps in the ring."""

    groups: int
    block_n: int
    stages: int


def serves(q: torch.Tensor) -> bool:
    """Whether this kernel can take q [N, heads, D]."""
    head = q.shape[2]
    # the copy engine wants heads at multiples of 16 bytes
    return is_hopper(q.device) and q.element_size() == 2 and MAIN < head <= MAIN + REST and head % 8 == 0


def tower_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, config: Config
) -> torch.Tensor:
    """See op.py. Patches of no picture get zeros."""
    count, heads, head = q.shape
    pictures = starts.shape[0] - 1
    out = torch.empty_like(q)
    # every picture may end in a tile that is not full, and so may the padding behind the last
    tiles = triton.cdiv(count, ROWS.value * config.groups) + min(pictures + 1, count)
    launched, computing = _registers(config.groups)
    k_tiles, v_tiles = (
        [
            TensorDescriptor.from_tensor(t.view(count, -1), [config.block_n, width], _layout(width))
            for width in (MAIN, REST)
        ]
        for t in (k, v)
    )
    _attend[(tiles * heads,)](
        q,
        out,
        starts,
        count,
        pictures,
        *k_tiles,
        *v_tiles,
        HEADS=heads,
        HEAD=head,
        BLOCK_N=config.block_n,
        STAGES=config.stages,
        PICTURES=max(64, triton.next_power_of_2(pictures + 1)),  # few variants to compile
        GROUPS=config.groups,
        COMPUTING=computing,
        num_warps=4,
        maxnreg=launched,
        **overlap(q.device),
    )
    return out


def _registers(groups: int) -> tuple[int, int]:
    """Registers a thread: of every warp group at launch, and of one that computes. They come in eights.

    The warp that fetches counts as a group, and leaves the others what it does not need.
    """
    launched = REGISTERS // (128 * (groups + 1)) // 8 * 8
    return launched, (launched * (groups + 1) - FETCHING.value) // groups // 8 * 8


@cache
def _layout(width: int) -> gl.NVMMASharedLayout:
    """Of tiles with `width` columns of 16 bits: a row is one swizzle."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * width, element_bitwidth=16)


@gluon.jit
def _places(rows, head, dims, HEADS: gl.constexpr, HEAD: gl.constexpr):
    """Offsets [rows, dims] into [N, heads, D]."""
    return ((rows * HEADS + head) * HEAD)[:, None] + dims[None, :]


@gluon.jit
def _load_queries(
    tile, q_ptr, first, stop, head, FROM: gl.constexpr, HEADS: gl.constexpr, HEAD: gl.constexpr
):
    """Queries first .. stop, dimensions FROM on, into a tile [ROWS, width]; zeros where there are none."""
    WIDTH: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    dims = FROM + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    inside = (rows < stop)[:, None] & (dims < HEAD)[None, :]
    tile.store(gl.load(q_ptr + _places(rows, head, dims, HEADS, HEAD), mask=inside, other=0.0))


@gluon.jit
def _store_part(out_ptr, acc, first, stop, head, FROM: gl.constexpr, HEADS: gl.constexpr, HEAD: gl.constexpr):
    """acc [ROWS, width] to dimensions FROM on of queries first .. stop."""
    layout: gl.constexpr = acc.type.layout
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    dims = FROM + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    inside = (rows < stop)[:, None] & (dims < HEAD)[None, :]
    gl.store(out_ptr + _places(rows, head, dims, HEADS, HEAD), acc.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _zero_behind(tile, live):
    """Rows of a tile from `live` on: zeros."""
    WIDTH: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    rows = gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout))
    tile.store(gl.where((rows < live)[:, None], tile.load(layout), 0.0))


@gluon.jit
def _fetch(descriptors, ring, full, free, start, stop, column):
    """Keys and values start .. stop of the head that begins at `column`, into the ring. What follows `stop`
    comes along."""
    k_main, k_rest, v_main, v_rest = descriptors
    k_mains, k_rests, v_mains, v_rests = ring
    STAGES: gl.constexpr = k_mains.shape[0]
    BLOCK_N: gl.constexpr = k_mains.shape[1]
    MAIN: gl.constexpr = k_mains.shape[2]
    BYTES: gl.constexpr = 2 * (k_main.block_type.nbytes + k_rest.block_type.nbytes)
    for step in range((stop - start + BLOCK_N - 1) // BLOCK_N):
        slot = step % STAGES
        at = start + step * BLOCK_N
        ready = full.index(slot)
        mbarrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)
        mbarrier.expect(ready, BYTES)
        tma.async_copy_global_to_shared(k_main, [at, column], ready, k_mains.index(slot))
        tma.async_copy_global_to_shared(k_rest, [at, column + MAIN], ready, k_rests.index(slot))
        tma.async_copy_global_to_shared(v_main, [at, column], ready, v_mains.index(slot))
        tma.async_copy_global_to_shared(v_rest, [at, column + MAIN], ready, v_rests.index(slot))


@gluon.jit
def _step(
    step, live, q, q_rest, ring, full, free, clean, acc, acc_rest, best, total,
    GROUP: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """The keys of one step, of which the first `live` count; only the LAST step has fewer than all.

    Behind a head come dimensions of the next one: those of k meet zeros of q, those of v become columns that
    are not stored.
    """
    k_mains, k_rests, v_mains, v_rests = ring
    STAGES: gl.constexpr = k_mains.shape[0]
    BLOCK_N: gl.constexpr = k_mains.shape[1]
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    main: gl.constexpr = acc.type.layout
    rest: gl.constexpr = acc_rest.type.layout
    slot = step % STAGES
    v, v_rest = v_mains.index(slot), v_rests.index(slot)
    mbarrier.wait(full.index(slot), step // STAGES & 1)
    if LAST:  # probabilities are 0 behind `live`, but what other patches hold may be NaN
        if GROUP == 0:  # it has queries whenever one of the groups has any
            _zero_behind(v, live)
            _zero_behind(v_rest, live)
            fence_async_shared()
            mbarrier.arrive(clean, count=1)
        else:
            mbarrier.wait(clean, 0)
    scores = gl.zeros([ROWS, BLOCK_N], gl.float32, scored)
    scores = warpgroup_mma(q, k_mains.index(slot).permute((1, 0)), scores, use_acc=False, is_async=True)
    scores = warpgroup_mma(q_rest, k_rests.index(slot).permute((1, 0)), scores, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    if LAST:
        keys = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scored))
        scores = gl.where((keys < live)[None, :], scores, float("-inf"))
    p, keep, best, total = soften(scores, best, total)
    p = p.to(q.dtype)
    # the layouts differ in name only: no value moves
    keep_main = gl.convert_layout(keep, gl.SliceLayout(1, main))[:, None]
    keep_rest = gl.convert_layout(keep, gl.SliceLayout(1, rest))[:, None]
    p_main = gl.convert_layout(p, gl.DotOperandLayout(0, main, 2))
    p_rest = gl.convert_layout(p, gl.DotOperandLayout(0, rest, 2))
    acc = warpgroup_mma(p_main, v, acc * keep_main, is_async=True)
    acc_rest = warpgroup_mma(p_rest, v_rest, acc_rest * keep_rest, is_async=True)
    acc, acc_rest = warpgroup_mma_wait(0, deps=[acc, acc_rest])
    mbarrier.arrive(free.index(slot), count=1)
    return acc, acc_rest, best, total


@gluon.jit
def _compute(
    q_ptr, out_ptr, qs, q_rests, ring, full, free, clean, first, end, start, stop, head,
    GROUP: gl.constexpr, HEADS: gl.constexpr, HEAD: gl.constexpr,
):  # fmt: skip
    """Outputs of one group's queries, of those from `first` on to `end`, over the keys start .. stop."""
    MAIN: gl.constexpr = qs.shape[2]
    REST: gl.constexpr = q_rests.shape[2]
    BLOCK_N: gl.constexpr = ring[0].shape[1]
    STAGES: gl.constexpr = ring[0].shape[0]
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    main: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MAIN, 16])
    rest: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16])
    first += GROUP * ROWS
    whole = (stop - start) // BLOCK_N
    live = (stop - start) % BLOCK_N
    if first < end:
        q, q_rest = qs.index(GROUP), q_rests.index(GROUP)
        _load_queries(q, q_ptr, first, end, head, 0, HEADS, HEAD)
        _load_queries(q_rest, q_ptr, first, end, head, MAIN, HEADS, HEAD)
        fence_async_shared()
        acc = gl.zeros([ROWS, MAIN], gl.float32, main)
        acc_rest = gl.zeros([ROWS, REST], gl.float32, rest)
        best = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, scored))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, scored))
        for step in range(whole):
            acc, acc_rest, best, total = _step(
                step, BLOCK_N, q, q_rest, ring, full, free, clean, acc, acc_rest, best, total, GROUP, False
            )
        if live > 0:
            acc, acc_rest, best, total = _step(
                whole, live, q, q_rest, ring, full, free, clean, acc, acc_rest, best, total, GROUP, True
            )
        share = 1.0 / gl.where(total == 0.0, 1.0, total)  # 0: patches of no picture
        share_main = gl.convert_layout(share, gl.SliceLayout(1, main))[:, None]
        share_rest = gl.convert_layout(share, gl.SliceLayout(1, rest))[:, None]
        _store_part(out_ptr, acc * share_main, first, end, head, 0, HEADS, HEAD)
        _store_part(out_ptr, acc_rest * share_rest, first, end, head, MAIN, HEADS, HEAD)
    else:  # a group without queries lets the ring go on
        for step in range((stop - start + BLOCK_N - 1) // BLOCK_N):
            mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
            mbarrier.arrive(free.index(step % STAGES), count=1)


@gluon.jit(do_not_specialize=["count", "pictures"])
def _attend(
    q_ptr,
    out_ptr,
    start_ptr,
    count,
    pictures,
    k_main,
    k_rest,
    v_main,
    v_rest,
    HEADS: gl.constexpr,
    HEAD: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PICTURES: gl.constexpr,
    GROUPS: gl.constexpr,
    COMPUTING: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """GROUPS: warp groups that compute. COMPUTING: registers of each of their threads."""
    BLOCK_M: gl.constexpr = ROWS * GROUPS
    after_previous(OVERLAP)
    # the padding behind the last picture is one picture more, to be zeroed
    index = gl.arange(0, PICTURES, gl.BlockedLayout([1], [32], [4], [0]))
    begins = gl.load(start_ptr + index, mask=index <= pictures, other=count)
    ends = gl.load(start_ptr + index + 1, mask=index < pictures, other=count)
    head = gl.program_id(0) % HEADS
    tile = gl.program_id(0) // HEADS
    if tile >= count_tiles(begins, ends, BLOCK_M):
        return
    picture, first, end = find_tile(begins, ends, tile, BLOCK_M)
    start = gl.load(start_ptr + picture)
    stop = gl.where(picture < pictures, end, start)  # padding attends to nothing

    MAIN: gl.constexpr = k_main.block_type.shape[1]
    REST: gl.constexpr = k_rest.block_type.shape[1]
    dtype: gl.constexpr = k_main.dtype
    wide: gl.constexpr = k_main.layout
    thin: gl.constexpr = k_rest.layout
    qs = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, MAIN], wide)
    q_rests = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, REST], thin)
    ring = (
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, MAIN], wide),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, REST], thin),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, MAIN], wide),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, REST], thin),
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    clean = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(clean, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=GROUPS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    q_ptr,
                    out_ptr,
                    qs,
                    q_rests,
                    ring,
                    full,
                    free,
                    clean,
                    first,
                    end,
                    start,
                    stop,
                    head,
                    group,
                    HEADS,
                    HEAD,
                ),
            )
            for group in (0, 1, 2, 3)[:GROUPS]
        ]
        + [(_fetch, ((k_main, k_rest, v_main, v_rest), ring, full, free, start, stop, head * HEAD))],
        [4] * (GROUPS - 1) + [1],
        [COMPUTING] * (GROUPS - 1) + [FETCHING],
    )
