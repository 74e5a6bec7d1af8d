"""Segment B on the GPU: norm, rotation and page write of q, k and v in one launch.

A program takes a few heads of one token. Its kind is the same for all its heads, so it branches once:
query heads first, then K heads (with k_eq_v they write V as well, from the same sum of squares), then V.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from gemcut.kernels.add_norm.triton import rounded
from gemcut.kernels.backend import Backend
from gemcut.kernels.rope.triton import rotate


@triton.jit
def _norm_heads(low, high, eps, D: tl.constexpr):
    """n(x) without weight of heads given as two halves [heads, D / 2], fp32."""
    squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
    scale = tl.rsqrt(squares / D + eps)[:, None]
    return low * scale, high * scale


@triton.jit
def _turn_heads(
    low, high, weight_ptr, cos, sin, half, live, dtype: tl.constexpr, D: tl.constexpr, ROUND: tl.constexpr
):  # fmt: skip
    """Normed heads times the norm's weight, turned where angles are live."""
    low_weight = tl.load(weight_ptr + half).to(tl.float32)[None, :]
    high_weight = tl.load(weight_ptr + D // 2 + half).to(tl.float32)[None, :]
    low = rounded(low * low_weight, dtype, ROUND)
    high = rounded(high * high_weight, dtype, ROUND)
    turned_low, turned_high = rotate(low, high, cos, sin, dtype, ROUND)
    return tl.where(live, turned_low, low), tl.where(live, turned_high, high)


@triton.jit
def _store_heads(pointer, low, high, D: tl.constexpr, mask):
    dtype = pointer.dtype.element_ty
    tl.store(pointer, low.to(dtype), mask)
    tl.store(pointer + D // 2, high.to(dtype), mask)


@triton.jit(do_not_specialize=["count"])
def _prepare_qkv(
    qkv_ptr, q_norm_ptr, k_norm_ptr, rope_ptr, slots_ptr, q_ptr, k_pages_ptr, v_pages_ptr, count, eps,
    QH: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, A: tl.constexpr,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr, K_EQ_V: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    Q_TILES: tl.constexpr = QH // Q_TILE
    K_TILES: tl.constexpr = KH // K_TILE
    COLUMNS: tl.constexpr = (QH + (1 if K_EQ_V else 2) * KH) * D
    dtype = q_ptr.dtype.element_ty
    half = tl.arange(0, D // 2)
    live = (half < A)[None, :]
    cos = tl.load(rope_ptr + token * A + half, half < A, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(rope_ptr + (count + token) * A + half, half < A, other=0.0).to(tl.float32)[None, :]
    row = qkv_ptr + token * COLUMNS
    if tile < Q_TILES:
        inside = (tile * Q_TILE + tl.arange(0, Q_TILE))[:, None] * D + half[None, :]
        low = tl.load(row + inside).to(tl.float32)
        high = tl.load(row + inside + D // 2).to(tl.float32)
        low, high = _norm_heads(low, high, eps, D)
        low, high = _turn_heads(low, high, q_norm_ptr, cos, sin, half, live, dtype, D, ROUND)
        _store_heads(q_ptr + token * (QH * D) + inside, low, high, D, None)
    else:
        slot = tl.load(slots_ptr + token)  # int64: a page's place times Hk * D passes 2^31
        is_value = tile >= Q_TILES + K_TILES
        head = (tile - Q_TILES) * K_TILE  # V heads follow K heads, as in the row
        row += QH * D + head * D
        first = head - tl.where(is_value, KH, 0)
        inside = tl.arange(0, K_TILE)[:, None] * D + half[None, :]
        to = slot * (KH * D) + first * D + inside
        written = (slot >= 0) & (inside >= 0)
        low = tl.load(row + inside).to(tl.float32)
        high = tl.load(row + inside + D // 2).to(tl.float32)
        low, high = _norm_heads(low, high, eps, D)
        if is_value or K_EQ_V:
            _store_heads(v_pages_ptr + to, low, high, D, written)
        if not is_value:
            low, high = _turn_heads(low, high, k_norm_ptr, cos, sin, half, live, dtype, D, ROUND)
            _store_heads(k_pages_ptr + to, low, high, D, written)


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
        num_warps=warps,
    )  # fmt: skip
    return q
