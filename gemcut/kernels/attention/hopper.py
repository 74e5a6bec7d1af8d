"""Attention at head size 512 on Hopper, for chunks of a prompt: loads and products ordered by hand (Gluon).

64 rows by 64 keys. The output takes half of all registers, Q, K and V most of the shared memory, one tile of
each. So eight warps go in step, two warp groups that share the scores by keys and the output by columns. The
scores of the next step are computed ahead of this step's product with V, so that their softmax runs behind
that product; K is asked for as soon as the scores are there, V as soon as it is added up.
"""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportAssignmentType=false

from __future__ import annotations

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

from gemcut.kernels.attention.rows import find_queries
from gemcut.kernels.overlap import after_previous, is_hopper, overlap
from gemcut.kernels.softmax import raise_best

HEAD = 512  # the head size that this shape of tiles is made for
BLOCK = 64  # (token, head) pairs a program, and keys a step
# Up to so many pairs, programs for half of the columns each are faster: there are twice as many of them.
FEW_PAIRS = 4096  # 256 tokens of 16 heads


def serves(q: torch.Tensor, k_pages: torch.Tensor, spans: torch.Tensor | None, window: int | None) -> bool:
    """Whether this is the kernel for these arguments of `paged_attention`."""
    count, q_heads, head = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    return (
        spans is None
        and window is None
        and head == HEAD
        and q.element_size() == 2
        and page_size % BLOCK == 0
        and q_heads // kv_heads <= BLOCK
        and count * q_heads > FEW_PAIRS
        and is_hopper(q.device)
    )


def attend_chunks(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """`paged_attention` into `out`, where `serves`. Rows with a single query are left out."""
    count, q_heads, head = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    rows = seq_lens.shape[0]
    block_t = BLOCK // (q_heads // kv_heads)
    # every row may end in a tile that is not full, and so may the padding behind the last row
    tiles = triton.cdiv(count, block_t) + min(rows + 1, count)
    shape, dtype = [BLOCK, head], gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(shape, dtype)
    k_tiles, v_tiles = (
        TensorDescriptor.from_tensor(pages.view(-1, kv_heads * head), shape, layout)
        for pages in (k_pages, v_pages)
    )
    _attend_chunks[(tiles * kv_heads,)](
        q,
        out,
        page_table,
        query_start,
        seq_lens,
        count,
        rows,
        page_table.shape[1],
        k_tiles,
        v_tiles,
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        HEAD=head,
        PAGE=page_size,
        BLOCK=BLOCK,
        ROWS=max(64, triton.next_power_of_2(rows + 1)),  # few variants to compile
        num_warps=8,
        **overlap(q.device),
    )


@gluon.jit
def _place(table, start, high, PAGE: gl.constexpr):
    """Where keys from `start` on lie in their pool; 0 behind the last key, `high`."""
    return gl.load(table + start // PAGE, mask=start < high, other=0) * PAGE + start % PAGE


@gluon.jit
def _fetch(tiles, place, column, barrier, to, wanted):
    """Ask for a tile of K or V. `barrier` ends a phase when it is there."""
    mbarrier.expect(barrier, tiles.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(tiles, [place, column], barrier, to, pred=wanted)


@gluon.jit
def _soften(scores, keys, positions, high, best, total):
    """Softmax over the scores of a step: p, what earlier sums are multiplied by, the maxima, the sums.

    total: [M, N] fp32, summed over a row at the end only, so that no warp waits for another one's sum.
    """
    seen = (keys[None, :] <= positions[:, None]) & (keys < high)[None, :]
    p, keep, best = raise_best(gl.where(seen, scores, float("-inf")), best)
    return p, keep, best, total * keep[:, None] + p


@gluon.jit
def _clear(values, first):
    """Zero rows of a tile from `first` on. A slot that holds no key may hold NaN, and 0 * NaN is NaN."""
    COLUMNS: gl.constexpr = 64  # at a time: few registers
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    PIECES: gl.constexpr = values.shape[1] // COLUMNS
    real = gl.arange(0, values.shape[0], gl.SliceLayout(1, LAYOUT)) < first
    for i in gl.static_range(PIECES):
        piece = values.slice(i * COLUMNS, COLUMNS, dim=1)
        piece.store(gl.where(real[:, None], piece.load(LAYOUT), 0.0))
    fence_async_shared()


@gluon.jit(do_not_specialize=["tokens", "rows", "table_width"])
def _attend_chunks(
    q_ptr,
    out_ptr,
    table_ptr,
    start_ptr,
    length_ptr,
    tokens,
    rows,
    table_width,
    k_tiles,
    v_tiles,
    Q_HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    HEAD: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK: gl.constexpr,
    ROWS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """A program takes one KV head and BLOCK / GROUP tokens with all their query heads of it.

    k_tiles, v_tiles: descriptors of the pools [places, KV_HEADS * HEAD], BLOCK keys of one head a copy.
    """
    after_previous(OVERLAP)
    GROUP: gl.constexpr = Q_HEADS // KV_HEADS
    BLOCK_T: gl.constexpr = BLOCK // GROUP
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK // 2, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, HEAD // 2, 16])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])  # a row a warp: memory's order
    dtype: gl.constexpr = q_ptr.dtype.element_ty

    kv_head = gl.program_id(0) % KV_HEADS
    index = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [8], [0]))
    found, row, first, stop = find_queries(
        index, start_ptr, tokens, rows, gl.program_id(0) // KV_HEADS, BLOCK_T, SKIP_SINGLE=True
    )
    if not found:
        return
    m = gl.arange(0, BLOCK, gl.SliceLayout(1, WIDE))
    dims = gl.arange(0, HEAD, gl.SliceLayout(0, WIDE))
    valid = (m // GROUP < BLOCK_T) & (first + m // GROUP < stop)
    base = first.to(gl.int64) * (Q_HEADS * HEAD) + kv_head * (GROUP * HEAD)
    inside = (m // GROUP * (Q_HEADS * HEAD) + m % GROUP * HEAD)[:, None] + dims[None, :]
    if row == rows:
        gl.store(out_ptr + base + inside, gl.full([BLOCK, HEAD], 0.0, dtype, WIDE), mask=valid[:, None])
        return

    queries = gl.allocate_shared_memory(dtype, [BLOCK, HEAD], k_tiles.layout)
    keys = gl.allocate_shared_memory(dtype, [BLOCK, HEAD], k_tiles.layout)
    values = gl.allocate_shared_memory(dtype, [BLOCK, HEAD], v_tiles.layout)
    # two: those of the next step are stored while this step's product still reads its own
    weights = gl.allocate_shared_memory(
        dtype, [2, BLOCK, BLOCK], gl.NVMMASharedLayout.get_default_for([BLOCK, BLOCK], dtype)
    )
    k_there = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_there = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(k_there, count=1)
    mbarrier.init(v_there, count=1)
    fence_async_shared()

    length = gl.load(length_ptr + row)
    lowest = length - stop + first  # position of the tile's first query
    high = gl.minimum(lowest + BLOCK_T, length)  # no query of the tile sees a key from here on
    last = (high - 1) // BLOCK  # step
    table = table_ptr + row.to(gl.int64) * table_width
    column = kv_head * HEAD
    place = _place(table, 0, high, PAGE)
    _fetch(k_tiles, place, column, k_there, keys, True)
    _fetch(v_tiles, place, column, v_there, values, True)
    place = _place(table, BLOCK, high, PAGE)

    q = gl.load(q_ptr + base + inside, mask=valid[:, None], other=0.0)
    queries.store(q)
    fence_async_shared()
    positions = lowest + gl.arange(0, BLOCK, gl.SliceLayout(1, SCORES)) // GROUP
    n = gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))
    best = gl.full([BLOCK], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([BLOCK, BLOCK], gl.float32, SCORES)
    acc = gl.zeros([BLOCK, HEAD], gl.float32, OUT)

    mbarrier.wait(k_there, 0)
    scores = warpgroup_mma(queries, keys.permute((1, 0)), total, use_acc=False)
    _fetch(k_tiles, place, column, k_there, keys, last > 0)
    p, keep, best, total = _soften(scores, n, positions, high, best, total)
    weights.index(0).store(p.to(dtype))
    fence_async_shared()
    for i in range(last):
        later = _place(table, (i + 2) * BLOCK, high, PAGE)  # long before the copy that waits for it
        mbarrier.wait(k_there, (i + 1) & 1)
        # not added to `scores`: those are registers that nothing writes while the products run
        scores = warpgroup_mma(queries, keys.permute((1, 0)), scores, use_acc=False, is_async=True)
        mbarrier.wait(v_there, i & 1)
        acc = warpgroup_mma(weights.index(i % 2), values, acc, is_async=True)
        scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
        _fetch(k_tiles, later, column, k_there, keys, i + 1 < last)
        p, keep, best, total = _soften(scores, (i + 1) * BLOCK + n, positions, high, best, total)
        weights.index((i + 1) % 2).store(p.to(dtype))
        fence_async_shared()
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        _fetch(v_tiles, place, column, v_there, values, True)
        acc = acc * gl.convert_layout(keep, gl.SliceLayout(1, OUT), assert_trivial=True)[:, None]
        place = later
    mbarrier.wait(v_there, last & 1)
    if (last + 1) * BLOCK > length:
        _clear(values, length - last * BLOCK)
    acc = warpgroup_mma(weights.index(last % 2), values, acc)

    mbarrier.invalidate(k_there)
    mbarrier.invalidate(v_there)
    norm = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, OUT), assert_trivial=True)
    acc = acc / gl.where(norm == 0.0, 1.0, norm)[:, None]  # 0: pairs behind the row's end
    values.store(acc.to(dtype))  # through shared memory, so that whole rows are written
    gl.store(out_ptr + base + inside, values.load(WIDE), mask=valid[:, None])
