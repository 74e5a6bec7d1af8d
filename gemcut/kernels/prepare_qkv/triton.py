"""Segment B on the GPU: norm, rotation and page write of q, k and v in one launch.

A program takes a few heads of one token. Its kind is the same for all its heads, so it branches once:
query heads first, then K heads (with k_eq_v they write V as well, from the same sum of squares), then V.
"""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from gemcut.kernels.add_norm.triton import fuses, rounded
from gemcut.kernels.backend import Backend
from gemcut.kernels.overlap import after_previous, overlap
from gemcut.kernels.rope.triton import rotate


@triton.jit
def _load_heads(pointer, eps, D: tl.constexpr):
    """n(x) without weight of heads in two halves [heads, D / 2], fp32."""
    low = tl.load(pointer).to(tl.float32)
    high = tl.load(pointer + D // 2).to(tl.float32)
    squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
    scale = tl.rsqrt(squares / D + eps)[:, None]
    return low * scale, high * scale


@triton.jit
def _turn_heads(
    low, high, weight_ptr, rope_ptr, token, count, half,
    dtype: tl.constexpr, D: tl.constexpr, A: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Normed heads times the norm's weight, turned where angles are live."""
    live = half < A
    cos = tl.load(rope_ptr + token * A + half, live, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(rope_ptr + (count + token) * A + half, live, other=0.0).to(tl.float32)[None, :]
    low_weight = tl.load(weight_ptr + half).to(tl.float32)[None, :]
    high_weight = tl.load(weight_ptr + D // 2 + half).to(tl.float32)[None, :]
    low = rounded(low * low_weight, dtype, ROUND)
    high = rounded(high * high_weight, dtype, ROUND)
    turned_low, turned_high = rotate(low, high, cos, sin, dtype, ROUND)
    return tl.where(live[None, :], turned_low, low), tl.where(live[None, :], turned_high, high)


@triton.jit
def _store_heads(pointer, low, high, D: tl.constexpr):
    dtype = pointer.dtype.element_ty
    tl.store(pointer, low.to(dtype))
    tl.store(pointer + D // 2, high.to(dtype))


@triton.jit
def _prepare_q(
    row, q_norm_ptr, rope_ptr, q_ptr, token, count, tile, eps,
    QH: tl.constexpr, D: tl.constexpr, A: tl.constexpr, Q_TILE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    dtype = q_ptr.dtype.element_ty
    half = tl.arange(0, D // 2)
    inside = (tile * Q_TILE + tl.arange(0, Q_TILE))[:, None] * D + half[None, :]
    low, high = _load_heads(row + inside, eps, D)
    low, high = _turn_heads(low, high, q_norm_ptr, rope_ptr, token, count, half, dtype, D, A, ROUND)
    _store_heads(q_ptr + token * (QH * D) + inside, low, high, D)


@triton.jit
def _prepare_kv(
    row, k_norm_ptr, rope_ptr, k_pages_ptr, v_pages_ptr, slot, token, count, head, eps,
    KH: tl.constexpr, D: tl.constexpr, A: tl.constexpr, K_TILE: tl.constexpr, K_EQ_V: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """K_TILE heads from `head` on, counted over K and, without k_eq_v, then V; `row` starts at K."""
    dtype = k_pages_ptr.dtype.element_ty
    half = tl.arange(0, D // 2)
    inside = tl.arange(0, K_TILE)[:, None] * D + half[None, :]
    is_value = head >= KH
    low, high = _load_heads(row + head * D + inside, eps, D)
    # int64: a page's place times Hk * D passes 2^31
    to = slot * (KH * D) + (head % KH) * D + inside
    if is_value or K_EQ_V:
        _store_heads(v_pages_ptr + to, low, high, D)
    if not is_value:
        low, high = _turn_heads(low, high, k_norm_ptr, rope_ptr, token, count, half, dtype, D, A, ROUND)
        _store_heads(k_pages_ptr + to, low, high, D)


@triton.jit(do_not_specialize=["count"])
def _prepare_qkv(
    qkv_ptr, q_norm_ptr, k_norm_ptr, rope_ptr, slots_ptr, q_ptr, k_pages_ptr, v_pages_ptr, count, eps,
    QH: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, A: tl.constexpr,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr, K_EQ_V: tl.constexpr, ROUND: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    after_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    row = qkv_ptr + token * ((QH + (1 if K_EQ_V else 2) * KH) * D)
    if tile < QH // Q_TILE:
        _prepare_q(row, q_norm_ptr, rope_ptr, q_ptr, token, count, tile, eps, QH, D, A, Q_TILE, ROUND)
    else:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            head = (tile - QH // Q_TILE) * K_TILE
            _prepare_kv(
                row + QH * D, k_norm_ptr, rope_ptr, k_pages_ptr, v_pages_ptr, slot, token, count, head, eps,
                KH, D, A, K_TILE, K_EQ_V, ROUND,
            )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _prepare_q_alone(
    rows_ptr, q_norm_ptr, rope_ptr, q_ptr, count, eps,
    QH: tl.constexpr, D: tl.constexpr, A: tl.constexpr, Q_TILE: tl.constexpr, ROUND: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    after_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    row = rows_ptr + token * (QH * D)
    _prepare_q(row, q_norm_ptr, rope_ptr, q_ptr, token, count, tl.program_id(1), eps, QH, D, A, Q_TILE, ROUND)


@cache
def _shape(q_heads: int, kv_heads: int, head: int) -> tuple[int, int, int]:
    """(query heads, KV heads, warps) of a program.

    Up to 2048 values, so that one warp a program has 16 bytes of each half head in flight for every
    thread at the least; a power of two that divides the heads, so that no lane idles.
    """
    most = max(1, 2048 // head)
    q_tile, k_tile = (min(most, heads & -heads) for heads in (q_heads, kv_heads))
    return q_tile, k_tile, max(1, min(4, max(q_tile, k_tile) * head // 512))


def prepare_qkv(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    rope: torch.Tensor,
    slots: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    *,
    q_heads: int,
    eps: float,
    backend: Backend,
) -> torch.Tensor:
    count, head, kv_heads = qkv.shape[0], q_norm.shape[0], k_pages.shape[2]
    k_eq_v = qkv.shape[1] == (q_heads + kv_heads) * head
    q = qkv.new_empty(count, q_heads, head)
    q_tile, k_tile, warps = _shape(q_heads, kv_heads, head)
    tiles = q_heads // q_tile + (1 if k_eq_v else 2) * (kv_heads // k_tile)
    _prepare_qkv[(count, tiles)](
        qkv, q_norm, k_norm, rope, slots, q, k_pages, v_pages, count, eps,
        q_heads, kv_heads, head, rope.shape[2], q_tile, k_tile, k_eq_v, backend.numerics == "reference",
        num_warps=warps, enable_fp_fusion=fuses(backend), **overlap(qkv.device),
    )  # fmt: skip
    return q


def prepare_q(
    q: torch.Tensor, q_norm: torch.Tensor, rope: torch.Tensor, *, eps: float, backend: Backend
) -> torch.Tensor:
    count, head = q.shape[0], q_norm.shape[0]
    q_heads = q.shape[1] // head
    out = q.new_empty(count, q_heads, head)
    tile, _, warps = _shape(q_heads, q_heads, head)
    _prepare_q_alone[(count, q_heads // tile)](
        q, q_norm, rope, out, count, eps,
        q_heads, head, rope.shape[2], tile, backend.numerics == "reference",
        num_warps=warps, enable_fp_fusion=fuses(backend), **overlap(q.device),
    )  # fmt: skip
    return out
