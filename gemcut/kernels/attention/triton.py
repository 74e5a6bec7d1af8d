"""Paged attention on a GPU: one kernel for chunks of a prompt, one for rows with a single query. On Hopper,
large chunks at head size 512 have a kernel of their own (`hopper.py`).

Nothing here waits for the device: grids come from shapes alone, lengths are read by the programs. A step
can therefore be captured in a graph and replayed with other lengths.

Rows of a tile are (token, query head) pairs of one KV head, so that grouped queries share every key they
read. Scores never leave the registers; fp32 inside, one rounding at the end.
"""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gemcut.kernels.attention import hopper
from gemcut.kernels.attention.rows import find_queries
from gemcut.kernels.backend import Backend
from gemcut.kernels.overlap import after_previous, copies_tiles, overlap
from gemcut.kernels.softmax import soften
from gemcut.kernels.tuned import tuned

WIDE_POOL = 2**31  # elements from which offsets into a pool need 64 bits; 32 save registers
SCRATCH_COLUMNS = 64  # columns that one program of the combine kernel adds up


@dataclass(frozen=True, slots=True)
class ChunkConfig:
    """block_m: (token, head) pairs a program. block_n: keys a step. part: output columns a program;
    less than the head size computes the scores twice and keeps 128 rows at head size 512 in registers.
    stages: page lookups take half of them, so K and V are under way (stages - 1) // 2 steps ahead.
    one_loop: masks every step, instead of a loop for steps that need none and one for the others."""

    block_m: int
    block_n: int
    part: int
    warps: int
    stages: int
    one_loop: bool = False


@dataclass(frozen=True, slots=True)
class SingleConfig:
    """block_n: keys a step. programs: how many the keys are split over, all rows and KV heads together."""

    block_n: int
    programs: int
    warps: int
    stages: int


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    spans: torch.Tensor | None,
    *,
    window: int | None,
    backend: Backend,
) -> torch.Tensor:
    """See op.py. As many tokens as rows: a decode step. Else rows with one query go to the kernel for them.

    Deterministic: every query goes through the kernel for chunks, whose key tiles lie at multiples of
    block_n; tiles that a query does not see change none of its bits.
    """
    count, head, rows = q.shape[0], q.shape[2], seq_lens.shape[0]
    page_size = k_pages.shape[1]
    if head < 16 or head & (head - 1) or page_size & (page_size - 1):
        raise ValueError(
            "paged_attention: the triton kernels need a head size of 2^n, 16 at least, and a page size of "
            f"2^n, got {head} and {page_size}"
        )
    out = torch.empty_like(q)
    if count == 0 or rows == 0:
        return out.zero_()
    arguments = (q, k_pages, v_pages, page_table, query_start, seq_lens, spans, window, out)
    if backend.deterministic:
        _chunks(*arguments, skip_single=False, deterministic=True)
    elif count == rows:
        _singles(*arguments, only_single=False)
    else:
        if hopper.serves(q, k_pages, spans, window):
            hopper.attend_chunks(q, k_pages, v_pages, page_table, query_start, seq_lens, out)
        else:
            _chunks(*arguments, skip_single=True, deterministic=False)
        _singles(*arguments, only_single=True)
    return out


def shape_key(kind: str, q: torch.Tensor, kv_heads: int) -> str:
    """Key of the tuned tables: kind "chunks" by tokens, "singles" by rows."""
    dtype = str(q.dtype).removeprefix("torch.")
    return f"{kind} D={q.shape[2]} G={q.shape[1] // kv_heads} Hk={kv_heads} {dtype}"


def chunk_config(q: torch.Tensor, kv_heads: int, deterministic: bool) -> ChunkConfig:
    count, q_heads, head = q.shape
    if not deterministic:  # then one config whatever the count
        fields = tuned(__file__, shape_key("chunks", q, kv_heads), count, q.device)
        if fields is not None:
            return ChunkConfig(**fields)
    least = max(16, triton.next_power_of_2(q_heads // kv_heads))
    if q.element_size() == 4:  # products of fp32 run outside the matrix units: parity, not speed
        return ChunkConfig(least, 16, min(head, 256), warps=4, stages=1)
    if head <= 64:
        return ChunkConfig(max(64, least), 64, head, warps=4, stages=3)
    if head <= 256:
        # five stages hold three tiles of K and V, of 32 keys: loads are issued behind a step's second
        # product, so those of the next step would come too late, those of the step after it do not
        return ChunkConfig(128, 32, head, warps=8, stages=5)
    return ChunkConfig(128, 32, min(head, 256), warps=8, stages=2)


def single_config(q: torch.Tensor, kv_heads: int, rows: int) -> SingleConfig:
    head = q.shape[2]
    fields = tuned(__file__, shape_key("singles", q, kv_heads), rows, q.device)
    if fields is not None:
        return SingleConfig(**fields)
    processors = 4
    if q.device.type == "cuda":
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    if q.element_size() == 4:
        return SingleConfig(16, processors, warps=4, stages=1)
    return SingleConfig(64 if head <= 256 else 32, 2 * processors, warps=4, stages=3)


def _chunks(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    spans: torch.Tensor | None,
    window: int | None,
    out: torch.Tensor,
    *,
    skip_single: bool,
    deterministic: bool,
) -> None:
    count, q_heads, head = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    rows = seq_lens.shape[0]
    config = chunk_config(q, kv_heads, deterministic)
    block_t = config.block_m // (q_heads // kv_heads)
    # every row may end in a tile that is not full, and so may the padding behind the last row
    tiles = triton.cdiv(count, block_t) + min(rows + 1, count)
    k_tiles = v_tiles = None
    if page_size % config.block_n == 0 and copies_tiles(q.device):
        k_tiles = TensorDescriptor.from_tensor(k_pages.view(-1, kv_heads * head), [config.block_n, head])
        v_tiles = TensorDescriptor.from_tensor(
            v_pages.view(-1, kv_heads * head), [config.block_n, config.part]
        )
    _attend_chunks[(tiles * kv_heads * (head // config.part),)](
        q,
        k_pages,
        v_pages,
        out,
        page_table,
        query_start,
        seq_lens,
        spans,
        count,
        rows,
        page_table.shape[1],
        k_tiles,
        v_tiles,
        WINDOW=window or 0,
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        HEAD=head,
        PART=config.part,
        PAGE=page_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        ROWS=max(64, triton.next_power_of_2(rows + 1)),  # few variants to compile
        SKIP_SINGLE=skip_single,
        ONE_LOOP=deterministic or config.one_loop,  # whether a step is masked differs between chunks
        WIDE=k_pages.numel() >= WIDE_POOL,
        num_warps=config.warps,
        num_stages=config.stages,
        **overlap(q.device),
    )


def _singles(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    spans: torch.Tensor | None,
    window: int | None,
    out: torch.Tensor,
    *,
    only_single: bool,
) -> None:
    q_heads, head = q.shape[1:]
    page_size, kv_heads = k_pages.shape[1:3]
    rows, width = page_table.shape
    config = single_config(q, kv_heads, rows)
    blocks = triton.cdiv(width * page_size, config.block_n)
    if window is not None:
        blocks = min(blocks, triton.cdiv(window, config.block_n) + 1)
    splits = max(1, min(blocks, triton.cdiv(config.programs, rows * kv_heads)))
    shares = rows * q_heads * splits if splits > 1 else 0
    sums = q.new_empty(shares, head, dtype=torch.float32)
    stats = q.new_empty(shares, 2, dtype=torch.float32)
    _attend_single[(kv_heads * splits * rows,)](
        q,
        k_pages,
        v_pages,
        out,
        sums,
        stats,
        page_table,
        query_start,
        seq_lens,
        spans,
        rows,
        width,
        splits,
        WINDOW=window or 0,
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        HEAD=head,
        PAGE=page_size,
        BLOCK_M=max(16, triton.next_power_of_2(q_heads // kv_heads)),
        BLOCK_N=config.block_n,
        ALONE=splits == 1,
        ONLY_SINGLE=only_single,
        WIDE=k_pages.numel() >= WIDE_POOL,
        num_warps=config.warps,
        num_stages=config.stages,
        **overlap(q.device),
    )
    if splits > 1:
        columns = min(head, SCRATCH_COLUMNS)
        _combine[(rows * q_heads * (head // columns),)](
            out,
            sums,
            stats,
            query_start,
            rows,
            splits,
            Q_HEADS=q_heads,
            HEAD=head,
            COLUMNS=columns,
            LANES=triton.next_power_of_2(splits),
            ONLY_SINGLE=only_single,
            num_warps=4 if splits > 16 else 1,
            **overlap(q.device),
        )


@triton.jit
def _key_rows(
    start,
    low,
    high,
    table,
    STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Where keys start .. start + BLOCK_N begin in their pool, in elements, without the head.

    Only pages with keys in [low, high) are looked up. One scalar load a page, not one a key: threads of
    K's and of V's layout share them, and few registers are held.
    """
    n = tl.arange(0, BLOCK_N)
    page = tl.load(table + start // PAGE, mask=start + PAGE > low, other=0)
    for j in tl.static_range(1, BLOCK_N // PAGE):
        begin = start + j * PAGE
        next_page = tl.load(table + begin // PAGE, mask=(begin < high) & (begin + PAGE > low), other=0)
        page = tl.where(n >= j * PAGE, next_page, page)
    if WIDE:  # 2^31 elements and more
        page = page.to(tl.int64)
    return (page * PAGE + (start + n) % PAGE) * STRIDE


@triton.jit
def _absorb(scores, values, acc, best, total):
    """One step of keys: their scores and values into the running sums."""
    p, keep, best, total = soften(scores, best, total)
    # probabilities are rounded to the activation dtype, their sum is not
    acc = tl.dot(p.to(values.dtype), values, acc * keep[:, None], input_precision="ieee")
    return acc, best, total


@triton.jit(do_not_specialize=["tokens", "rows", "table_width"])
def _attend_chunks(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    table_ptr,
    start_ptr,
    length_ptr,
    span_ptr,
    tokens,
    rows,
    table_width,
    k_tiles,
    v_tiles,
    WINDOW: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    PART: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    SKIP_SINGLE: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    WIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """k_tiles, v_tiles: descriptors of the pools [places, KV heads * head] for the copy engine, where a page
    holds whole tiles of keys; else None, and every key's place is computed."""
    after_previous(OVERLAP)
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    BLOCK_T: tl.constexpr = BLOCK_M // GROUP
    PARTS: tl.constexpr = HEAD // PART
    STRIDE: tl.constexpr = KV_HEADS * HEAD
    lane = tl.program_id(0) % (KV_HEADS * PARTS)
    kv_head = lane // PARTS
    part = lane % PARTS

    order = tl.program_id(0) // (KV_HEADS * PARTS)
    found, row, first, stop = find_queries(
        tl.arange(0, ROWS), start_ptr, tokens, rows, order, BLOCK_T, SKIP_SINGLE
    )
    if not found:
        return

    m = tl.arange(0, BLOCK_M)
    token = m // GROUP  # in the tile
    valid = (token < BLOCK_T) & (first + token < stop)
    dims = tl.arange(0, HEAD)
    columns = part * PART + tl.arange(0, PART)
    base = first.to(tl.int64) * (Q_HEADS * HEAD) + kv_head * (GROUP * HEAD)
    pairs = token * (Q_HEADS * HEAD) + (m % GROUP) * HEAD
    out_at = out_ptr + base + pairs[:, None] + columns[None, :]
    if row == rows:  # the padding behind the last one
        tl.store(out_at, tl.zeros([BLOCK_M, PART], out_ptr.dtype.element_ty), mask=valid[:, None])
        return

    length = tl.load(length_ptr + row)
    offset = length - stop  # position of a token less its place in the batch
    position = offset + first + token
    lowest = offset + first
    highest = offset + tl.minimum(first + BLOCK_T, stop) - 1
    high = highest + 1
    begin, end = position, position
    if span_ptr is not None:
        begin = tl.load(span_ptr + 2 * (first + token), mask=valid, other=0)
        end = tl.load(span_ptr + 2 * (first + token) + 1, mask=valid, other=0)
        high = tl.minimum(tl.maximum(high, tl.max(end, 0)), length)
    low = 0
    if WINDOW:
        low = tl.maximum(lowest - WINDOW + 1, 0)

    table = table_ptr + row.to(tl.int64) * table_width
    k_at = k_ptr + kv_head * HEAD
    v_at = v_ptr + kv_head * HEAD + part * PART
    part_dims = tl.arange(0, PART)
    q = tl.load(q_ptr + base + pairs[:, None] + dims[None, :], mask=valid[:, None], other=0.0)
    acc = tl.zeros([BLOCK_M, PART], tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    # Tiles of keys lie at multiples of BLOCK_N. Those that every token sees whole need no mask:
    # [clear_begin, clear_end). Before them is the window's edge, behind them the diagonal.
    edge = low // BLOCK_N * BLOCK_N
    if ONE_LOOP:
        edge_tiles = 0
        diagonal = edge
    else:
        clear_begin = edge
        if WINDOW:
            clear_begin = (tl.maximum(highest - WINDOW + 1, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        clear_end = (lowest + 1) // BLOCK_N * BLOCK_N
        edge_tiles = (clear_begin - edge) // BLOCK_N
        diagonal = tl.maximum(clear_begin, clear_end)
        page = tl.load(table + clear_begin // PAGE, mask=clear_begin < clear_end, other=0)
        for start in tl.range(clear_begin, clear_end, BLOCK_N):
            if k_tiles is not None:
                place = page * PAGE + start % PAGE
                # a step ahead: the copies of the next step wait for it
                page = tl.load(table + (start + BLOCK_N) // PAGE, mask=start + BLOCK_N < clear_end, other=0)
                k = k_tiles.load([place, kv_head * HEAD]).T
                scores = tl.dot(q, k, input_precision="ieee")  # the scale is exactly 1.0 (spec 2.1)
                v = v_tiles.load([place, kv_head * HEAD + part * PART])
            else:
                at = _key_rows(start, start, start + BLOCK_N, table, STRIDE, PAGE, BLOCK_N, WIDE)
                k = tl.load(k_at + at[None, :] + dims[:, None])  # [HEAD, BLOCK_N]
                scores = tl.dot(q, k, input_precision="ieee")
                v = tl.load(v_at + at[:, None] + part_dims[None, :])
            acc, best, total = _absorb(scores, v, acc, best, total)
    tiles = edge_tiles + (tl.maximum(high - diagonal, 0) + BLOCK_N - 1) // BLOCK_N
    for i in tl.range(0, tiles):
        start = tl.where(i < edge_tiles, edge + i * BLOCK_N, diagonal + (i - edge_tiles) * BLOCK_N)
        keys = start + tl.arange(0, BLOCK_N)
        real = (keys >= low) & (keys < high)
        if k_tiles is not None:
            # a tile lies within a page
            place = tl.load(table + start // PAGE) * PAGE + start % PAGE
            k = k_tiles.load([place, kv_head * HEAD]).T
            at = place + tl.arange(0, BLOCK_N)
            if WIDE:
                at = at.to(tl.int64)
            at = at * STRIDE
        else:
            at = _key_rows(start, low, high, table, STRIDE, PAGE, BLOCK_N, WIDE)
            k = tl.load(k_at + at[None, :] + dims[:, None], mask=real[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee")
        seen = keys[None, :] <= position[:, None]
        if span_ptr is not None:
            seen = seen | ((keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None]))
        if WINDOW:
            seen = seen & (keys[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen & real[None, :], scores, float("-inf"))
        # a slot that holds no key may hold NaN, and 0 * NaN is NaN
        v = tl.load(v_at + at[:, None] + part_dims[None, :], mask=real[:, None], other=0.0)
        acc, best, total = _absorb(scores, v, acc, best, total)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # 0: pairs behind the row's end
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=["rows", "table_width", "splits"])
def _attend_single(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    sum_ptr,
    stat_ptr,
    table_ptr,
    start_ptr,
    length_ptr,
    span_ptr,
    rows,
    table_width,
    splits,
    WINDOW: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALONE: tl.constexpr,
    ONLY_SINGLE: tl.constexpr,
    WIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """All query heads of a KV head of one query, over one of `splits` equal shares of the keys it sees.

    ONLY_SINGLE: rows with another number of queries belong to the kernel for chunks. Otherwise the step
    has as many tokens as rows, nearly always one each; a row with more takes them in turn.
    """
    after_previous(OVERLAP)
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    STRIDE: tl.constexpr = KV_HEADS * HEAD
    kv_head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(0) // KV_HEADS % splits
    row = tl.program_id(0) // (KV_HEADS * splits)
    first = tl.load(start_ptr + row)
    stop = tl.load(start_ptr + row + 1)
    length = tl.load(length_ptr + row)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD)
    pairs = kv_head * GROUP + m
    tile = pairs[:, None] * HEAD + dims[None, :]
    valid = m < GROUP
    if ONLY_SINGLE:
        if stop - first != 1:
            return
    else:
        if (row >= tl.load(start_ptr + rows)) & (
            split == 0
        ):  # as many tokens as rows: token `row` is padding
            at = out_ptr + row.to(tl.int64) * (Q_HEADS * HEAD) + tile
            tl.store(at, tl.zeros([BLOCK_M, HEAD], out_ptr.dtype.element_ty), mask=valid[:, None])

    table = table_ptr + row.to(tl.int64) * table_width
    k_at = k_ptr + kv_head * HEAD
    v_at = v_ptr + kv_head * HEAD
    for i in range(stop - first):
        token = first + i
        position = length - stop + token
        high = position + 1
        begin, end = position, position
        if span_ptr is not None:
            begin = tl.load(span_ptr + 2 * token)
            end = tl.load(span_ptr + 2 * token + 1)
            high = tl.minimum(tl.maximum(high, end), length)
        low = 0
        if WINDOW:
            low = tl.maximum(position - WINDOW + 1, 0)
        base = token.to(tl.int64) * (Q_HEADS * HEAD)
        q = tl.load(q_ptr + base + tile, mask=valid[:, None], other=0.0)
        acc = tl.zeros([BLOCK_M, HEAD], tl.float32)
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        edge = low // BLOCK_N * BLOCK_N
        share = ((high - edge + BLOCK_N - 1) // BLOCK_N + splits - 1) // splits * BLOCK_N
        from_key = edge + split * share
        for start in tl.range(from_key, tl.minimum(from_key + share, high), BLOCK_N):
            keys = start + n
            seen = (keys >= low) & (keys < high)
            at = _key_rows(start, low, high, table, STRIDE, PAGE, BLOCK_N, WIDE)
            k = tl.load(k_at + at[None, :] + dims[:, None], mask=seen[None, :], other=0.0)
            scores = tl.dot(q, k, input_precision="ieee")
            v = tl.load(v_at + at[:, None] + dims[None, :], mask=seen[:, None], other=0.0)
            if span_ptr is not None:
                seen = seen & ((keys <= position) | ((keys >= begin) & (keys < end)))
            scores = tl.where(seen[None, :], scores, float("-inf"))
            acc, best, total = _absorb(scores, v, acc, best, total)
        if ALONE:
            acc = acc / total[:, None]
            tl.store(out_ptr + base + tile, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None])
        else:
            slot = row if ONLY_SINGLE else token
            place = (slot * Q_HEADS + pairs) * splits + split
            tl.store(stat_ptr + 2 * place, best, mask=valid)
            tl.store(stat_ptr + 2 * place + 1, total, mask=valid)
            tl.store(sum_ptr + place[:, None] * HEAD + dims[None, :], acc, mask=valid[:, None])


@triton.jit(do_not_specialize=["rows", "splits"])
def _combine(
    out_ptr,
    sum_ptr,
    stat_ptr,
    start_ptr,
    rows,
    splits,
    Q_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ONLY_SINGLE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The shares of one query head's keys become its output: COLUMNS of it a program."""
    after_previous(OVERLAP)
    PARTS: tl.constexpr = HEAD // COLUMNS
    columns = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.program_id(0) // PARTS % Q_HEADS
    slot = tl.program_id(0) // (PARTS * Q_HEADS)
    token = slot
    if ONLY_SINGLE:
        token = tl.load(start_ptr + slot)
        if tl.load(start_ptr + slot + 1) - token != 1:
            return
    else:
        if slot >= tl.load(start_ptr + rows):
            return
    lanes = tl.arange(0, LANES)
    place = (slot * Q_HEADS + head) * splits + lanes
    best = tl.load(stat_ptr + 2 * place, mask=lanes < splits, other=float("-inf"))
    total = tl.load(stat_ptr + 2 * place + 1, mask=lanes < splits, other=0.0)
    share = tl.exp2(best - tl.max(best, 0))
    sums = tl.load(
        sum_ptr + place[:, None] * HEAD + columns[None, :], mask=(lanes < splits)[:, None], other=0.0
    )
    acc = tl.sum(sums * share[:, None], 0) / tl.sum(total * share, 0)
    at = out_ptr + (token.to(tl.int64) * Q_HEADS + head) * HEAD + columns
    tl.store(at, acc.to(out_ptr.dtype.element_ty))
