"""Attention within each picture on a GPU. A head size like 72 is a part of 64 and one of 16, eight unused:
two products instead of one twice as wide. Tiles lie at fixed places of their picture, so that what a
picture gets does not depend on the others. Hopper has a kernel of its own for such heads, in hopper.py.
"""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gemcut.kernels.overlap import after_previous, copies_tiles, overlap
from gemcut.kernels.ragged import count_tiles, find_tile
from gemcut.kernels.softmax import soften
from gemcut.kernels.tower_attention import hopper
from gemcut.kernels.tuned import tuned


@dataclass(frozen=True, slots=True)
class Config:
    """block_m: queries a program. block_n: keys a step."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def tower_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """See op.py. Patches of no picture get zeros."""
    count, heads, head = q.shape
    pictures = starts.shape[0] - 1
    out = torch.empty_like(q)
    if count == 0:
        return out
    config = find_config(q)
    if isinstance(config, hopper.Config):
        return hopper.tower_attention(q, k, v, starts, config)
    # every picture may end in a tile that is not full, and so may the padding behind the last
    tiles = triton.cdiv(count, config.block_m) + min(pictures + 1, count)
    main = max(16, 1 << (head.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(head - main)) if head > main else 0
    main_tiles = rest_tiles = None, None
    if copies_tiles(q.device) and heads * head * q.element_size() % 16 == 0:
        main_tiles, rest_tiles = (
            [TensorDescriptor.from_tensor(t.view(count, -1), [config.block_n, width]) for t in (k, v)]
            for width in (main, rest or main)
        )
    _attend[(tiles * heads,)](
        q,
        k,
        v,
        out,
        starts,
        count,
        pictures,
        *main_tiles,
        *rest_tiles,
        HEADS=heads,
        HEAD=head,
        MAIN=main,
        REST=rest,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        PICTURES=max(64, triton.next_power_of_2(pictures + 1)),  # few variants to compile
        num_warps=config.warps,
        num_stages=config.stages,
        **overlap(q.device),
    )
    return out


def shape_key(q: torch.Tensor) -> str:
    """Key of the tuned tables."""
    return f"D={q.shape[2]} {str(q.dtype).removeprefix('torch.')}"


def find_config(q: torch.Tensor) -> Config | hopper.Config:
    """Which kernel serves q [N, heads, D], and how."""
    # one entry whatever the count: tiles must lie at the same places in every batch
    fields = tuned(__file__, shape_key(q), 0, q.device)
    if fields is not None and "groups" not in fields:
        return Config(**fields)
    if hopper.serves(q):
        if fields is not None:
            return hopper.Config(**fields)
        return hopper.Config(groups=3, block_n=128, stages=4)
    if q.element_size() == 4:  # products of fp32 run outside the matrix units: parity, not speed
        return Config(32, 32, warps=4, stages=1)
    return Config(128, 64, warps=8, stages=3)


@triton.jit
def _part(
    ptr,
    rows,
    head,
    valid,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    UPRIGHT: tl.constexpr,
):
    """[rows, WIDTH] of one head from dimension FIRST on, or [WIDTH, rows] UPRIGHT; zeros behind the head's
    end and in rows that are not valid (None: all are)."""
    dims = FIRST + tl.arange(0, WIDTH)
    base = (rows * HEADS + head) * HEAD
    inside = None
    if UPRIGHT:
        at = ptr + base[None, :] + dims[:, None]
        if valid is not None:
            inside = valid[None, :] & (dims < HEAD)[:, None]
        elif FIRST + WIDTH > HEAD:
            inside = (dims < HEAD)[:, None] & (rows >= 0)[None, :]
    else:
        at = ptr + base[:, None] + dims[None, :]
        if valid is not None:
            inside = valid[:, None] & (dims < HEAD)[None, :]
        elif FIRST + WIDTH > HEAD:
            inside = (dims < HEAD)[None, :] & (rows >= 0)[:, None]
    return tl.load(at) if inside is None else tl.load(at, mask=inside, other=0.0)


@triton.jit
def _step(
    start,
    stop,
    head,
    k_ptr,
    v_ptr,
    k_main,
    v_main,
    k_rests,
    v_rests,
    q,
    q_rest,
    acc,
    acc_rest,
    best,
    total,
    LAST: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys start .. start + BLOCK_N; only the LAST step's may end before.

    Whole tiles come by the copy engine. Behind a head it fetches dimensions of the next one: those of k meet
    zeros of q, those of v become columns that are not stored.
    """
    TILES: tl.constexpr = k_main is not None and not LAST
    rows = start + tl.arange(0, BLOCK_N)
    valid = None
    if LAST:
        valid = rows < stop
    if TILES:
        k = k_main.load([start, head * HEAD]).T
    else:
        k = _part(k_ptr, rows, head, valid, 0, MAIN, HEADS, HEAD, True)
    scores = tl.dot(q, k, input_precision="ieee")
    if REST:
        if TILES:
            k_rest = k_rests.load([start, head * HEAD + MAIN]).T
        else:
            k_rest = _part(k_ptr, rows, head, valid, MAIN, REST, HEADS, HEAD, True)
        scores = tl.dot(q_rest, k_rest, scores, input_precision="ieee")
    if LAST:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    p, keep, best, total = soften(scores, best, total)
    p = p.to(q.dtype)
    if TILES:
        v = v_main.load([start, head * HEAD])
    else:
        v = _part(v_ptr, rows, head, valid, 0, MAIN, HEADS, HEAD, False)
    acc = tl.dot(p, v, acc * keep[:, None], input_precision="ieee")
    if REST:
        if TILES:
            v_rest = v_rests.load([start, head * HEAD + MAIN])
        else:
            v_rest = _part(v_ptr, rows, head, valid, MAIN, REST, HEADS, HEAD, False)
        acc_rest = tl.dot(p, v_rest, acc_rest * keep[:, None], input_precision="ieee")
    return acc, acc_rest, best, total


@triton.jit(do_not_specialize=["count", "pictures"])
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    start_ptr,
    count,
    pictures,
    k_main,
    v_main,
    k_rests,
    v_rests,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PICTURES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    after_previous(OVERLAP)
    head = tl.program_id(0) % HEADS
    # the padding behind the last picture is one picture more, to be zeroed
    index = tl.arange(0, PICTURES)
    begins = tl.load(start_ptr + index, mask=index <= pictures, other=count)
    ends = tl.load(start_ptr + index + 1, mask=index < pictures, other=count)
    tile = tl.program_id(0) // HEADS
    if tile >= count_tiles(begins, ends, BLOCK_M):
        return
    picture, first, stop = find_tile(begins, ends, tile, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    valid = rows < stop
    REST_COLUMNS: tl.constexpr = REST if REST else 16
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, MAIN], tl.float32)
    acc_rest = tl.zeros([BLOCK_M, REST_COLUMNS], tl.float32)
    if picture < pictures:
        start = tl.load(start_ptr + picture)
        q = _part(q_ptr, rows, head, valid, 0, MAIN, HEADS, HEAD, False)
        q_rest = q
        if REST:
            q_rest = _part(q_ptr, rows, head, valid, MAIN, REST, HEADS, HEAD, False)
        last = start + (stop - start) // BLOCK_N * BLOCK_N
        for at in tl.range(start, last, BLOCK_N):
            acc, acc_rest, best, total = _step(
                at, stop, head, k_ptr, v_ptr, k_main, v_main, k_rests, v_rests, q, q_rest, acc, acc_rest,
                best, total, False, HEADS, HEAD, MAIN, REST, BLOCK_N,
            )  # fmt: skip
        for at in tl.range(last, stop, BLOCK_N):
            acc, acc_rest, best, total = _step(
                at, stop, head, k_ptr, v_ptr, k_main, v_main, k_rests, v_rests, q, q_rest, acc, acc_rest,
                best, total, True, HEADS, HEAD, MAIN, REST, BLOCK_N,
            )  # fmt: skip
    share = 1.0 / tl.where(total == 0.0, 1.0, total)[:, None]  # 0: patches of no picture
    at = out_ptr + (rows * HEADS + head)[:, None] * HEAD
    dims = tl.arange(0, MAIN)[None, :]
    out = acc * share
    tl.store(at + dims, out.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (dims < HEAD))
    if REST:
        dims = MAIN + tl.arange(0, REST)[None, :]
        out = acc_rest * share
        tl.store(at + dims, out.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (dims < HEAD))
