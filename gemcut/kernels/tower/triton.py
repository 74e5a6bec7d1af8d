"""The vision tower's segments on the GPU."""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from gemcut.kernels.add_norm.triton import fuses, load_row, rms, rounded, row_shape
from gemcut.kernels.backend import Backend
from gemcut.kernels.overlap import after_previous, overlap
from gemcut.kernels.rope.triton import rotate

BLOCK = 2048  # 4 warps, 16 bytes of pixels a thread


@triton.jit(do_not_specialize=["count"])
def _scale_patches(
    pixels_ptr, out_ptr, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    after_previous(OVERLAP)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count.to(tl.int64) * WIDTH
    byte = tl.load(pixels_ptr + index, mask, other=0).to(tl.float64)
    # times 1/255 in fp64, rounded once: 126 of the 256 values differ in fp32 throughout (data.pixel_values)
    value = (byte * tl.full([], 1 / 255, tl.float64)).to(tl.float32)
    tl.store(out_ptr + index, (2 * (value - 0.5)).to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _add_positions(
    x_ptr, table_ptr, positions_ptr, next_ptr, x_out_ptr, h_ptr, eps, places,
    H: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    after_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < H
    dtype = x_out_ptr.dtype.element_ty
    column_place = tl.load(positions_ptr + 2 * row).to(tl.int64)
    row_place = tl.load(positions_ptr + 2 * row + 1).to(tl.int64) + places
    x = load_row(x_ptr + row * H, columns, mask)
    following = load_row(next_ptr, columns, mask)
    place = load_row(table_ptr + column_place * H, columns, mask)
    place = rounded(place + load_row(table_ptr + row_place * H, columns, mask), dtype, ROUND)
    x = rounded(x + place, dtype, ROUND)
    tl.store(x_out_ptr + row * H + columns, x.to(dtype), mask)
    tl.store(h_ptr + row * H + columns, (x * rms(x, eps, H) * following).to(dtype), mask)


@triton.jit
def _load_quarter(pointer, inside, mask):
    return tl.load(pointer + inside, mask, other=0.0).to(tl.float32)


@triton.jit
def _turn(
    low, high, weight_ptr, rope_ptr, patch, count, quarter, live,
    dtype: tl.constexpr, QUARTER: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Two normed quarters of heads times the norm's weight, turned by one coordinate's angles."""
    low_weight = tl.load(weight_ptr + quarter, live, other=0.0).to(tl.float32)[None, :]
    high_weight = tl.load(weight_ptr + QUARTER + quarter, live, other=0.0).to(tl.float32)[None, :]
    cos = tl.load(rope_ptr + patch * QUARTER + quarter, live, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(rope_ptr + (count + patch) * QUARTER + quarter, live, other=0.0).to(tl.float32)[None, :]
    low = rounded(low * low_weight, dtype, ROUND)
    high = rounded(high * high_weight, dtype, ROUND)
    return rotate(low, high, cos, sin, dtype, ROUND)


@triton.jit(do_not_specialize=["count"])
def _prepare_tower_qkv(
    qkv_ptr, q_norm_ptr, k_norm_ptr, x_rope_ptr, y_rope_ptr, q_ptr, k_ptr, v_ptr, count, eps,
    HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    after_previous(OVERLAP)
    # a head is held as four quarters of D / 4 (18 of 26B-A4B): both halves pair their own two quarters
    patch = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) // (HEADS // TILE)  # 0: q, 1: k, 2: v
    tile = tl.program_id(1) % (HEADS // TILE)
    QUARTER: tl.constexpr = D // 4
    dtype = q_ptr.dtype.element_ty
    quarter = tl.arange(0, BLOCK)
    live = quarter < QUARTER
    mask = live[None, :]
    inside = (tile * TILE + tl.arange(0, TILE))[:, None] * D + quarter[None, :]
    source = qkv_ptr + (patch * 3 + part) * (HEADS * D)
    a = _load_quarter(source, inside, mask)
    b = _load_quarter(source + QUARTER, inside, mask)
    c = _load_quarter(source + 2 * QUARTER, inside, mask)
    d = _load_quarter(source + 3 * QUARTER, inside, mask)
    squares = tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(c * c, 1) + tl.sum(d * d, 1)
    scale = tl.rsqrt(squares / D + eps)[:, None]
    a, b, c, d = a * scale, b * scale, c * scale, d * scale
    out = v_ptr
    if part < 2:
        out, weight = k_ptr, k_norm_ptr
        if part == 0:
            out, weight = q_ptr, q_norm_ptr
        a, b = _turn(a, b, weight, x_rope_ptr, patch, count, quarter, live, dtype, QUARTER, ROUND)
        weight += 2 * QUARTER
        c, d = _turn(c, d, weight, y_rope_ptr, patch, count, quarter, live, dtype, QUARTER, ROUND)
    out += patch * (HEADS * D)
    tl.store(out + inside, a.to(dtype), mask)
    tl.store(out + QUARTER + inside, b.to(dtype), mask)
    tl.store(out + 2 * QUARTER + inside, c.to(dtype), mask)
    tl.store(out + 3 * QUARTER + inside, d.to(dtype), mask)


@triton.jit
def _pool_patches(
    x_ptr, cells_ptr, bias_ptr, scale_ptr, out_ptr, root, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, STANDARDIZE: tl.constexpr, ROUND: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    after_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < H
    dtype = out_ptr.dtype.element_ty
    pooled = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(9):
        patch = tl.load(cells_ptr + row * 9 + i).to(tl.int64)
        pooled += load_row(x_ptr + patch * H, columns, mask) / 9
    pooled = rounded(pooled, dtype, ROUND) * root
    if STANDARDIZE:
        pooled = (pooled - load_row(bias_ptr, columns, mask)) * load_row(scale_ptr, columns, mask)
    pooled = rounded(pooled, dtype, ROUND)
    tl.store(out_ptr + row * H + columns, (pooled * rms(pooled, eps, H)).to(dtype), mask)


def scale_patches(pixels: torch.Tensor, dtype: torch.dtype, *, backend: Backend) -> torch.Tensor:
    out = torch.empty_like(pixels, dtype=dtype)
    count, width = pixels.shape
    _scale_patches[(triton.cdiv(count * width, BLOCK),)](
        pixels, out, count, width, BLOCK, num_warps=4, **overlap(pixels.device)
    )
    return out


def add_positions(
    x: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    next_weight: torch.Tensor,
    *,
    eps: float,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    count, hidden = x.shape
    block, warps = row_shape(hidden)
    x_out, h = torch.empty_like(x), torch.empty_like(x)
    _add_positions[(count,)](
        x, table, positions, next_weight, x_out, h, eps, table.shape[1],
        hidden, block, backend.numerics == "reference", num_warps=warps, **overlap(x.device),
    )  # fmt: skip
    return x_out, h


@cache
def _tower_shape(heads: int, head: int) -> tuple[int, int, int]:
    """(heads, columns of a padded quarter, warps) of a program: up to 16 heads, 4 a warp."""
    tile = min(16, heads & -heads)
    return tile, triton.next_power_of_2(head // 4), max(1, tile // 4)


def prepare_tower_qkv(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    x_rope: torch.Tensor,
    y_rope: torch.Tensor,
    *,
    eps: float,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count, head = qkv.shape[0], q_norm.shape[0]
    heads = qkv.shape[1] // (3 * head)
    q, k, v = (qkv.new_empty(count, heads, head) for _ in range(3))
    tile, block, warps = _tower_shape(heads, head)
    _prepare_tower_qkv[(count, 3 * (heads // tile))](
        qkv, q_norm, k_norm, x_rope, y_rope, q, k, v, count, eps,
        heads, head, tile, block, backend.numerics == "reference", num_warps=warps,
        enable_fp_fusion=fuses(backend), **overlap(qkv.device),
    )  # fmt: skip
    return q, k, v


def pool_patches(
    x: torch.Tensor,
    cells: torch.Tensor,
    std_bias: torch.Tensor | None,
    std_scale: torch.Tensor | None,
    *,
    eps: float,
    backend: Backend,
) -> torch.Tensor:
    count, hidden = cells.shape[0], x.shape[1]
    block, warps = row_shape(hidden)
    out = x.new_empty(count, hidden)
    standardize = std_bias is not None and std_scale is not None
    _pool_patches[(count,)](
        x, cells, std_bias, std_scale, out, hidden**0.5, eps,
        hidden, block, standardize, backend.numerics == "reference", num_warps=warps,
        enable_fp_fusion=fuses(backend), **overlap(x.device),
    )  # fmt: skip
    return out
