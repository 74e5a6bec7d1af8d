"""The vision tower's segments on the GPU."""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemcut.kernels.add_norm.triton import fuses, load_row, rms, rounded, row_shape
from gemcut.kernels.backend import Backend
from gemcut.kernels.overlap import after_previous, overlap

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
def _columns(FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns FIRST on of a head; of each the one it turns with, its angle, and whether it is the lower one.

    Both halves of a head pair their own two quarters of D / 4 (18 of 26B-A4B).
    """
    QUARTER: tl.constexpr = D // 4
    column = FIRST + tl.arange(0, WIDTH)
    inside = column % (2 * QUARTER)
    low = inside < QUARTER
    partner = tl.where(low, column + QUARTER, column - QUARTER)
    return column, partner, inside % QUARTER, low


@triton.jit
def _load_columns(pointer, columns, live):
    return tl.load(pointer + columns, live, other=0.0).to(tl.float32)


@triton.jit
def _turn(
    x, source, scale, heads, weight_ptr, x_rope_ptr, y_rope_ptr, patch, count, live,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, dtype: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Columns of heads times the norm's scale and weight, turned. Their partners come from L1 once more."""
    column, partner, angle, low = _columns(FIRST, WIDTH, D)
    QUARTER: tl.constexpr = D // 4
    rope_ptr = tl.where(column < D // 2, x_rope_ptr + angle, y_rope_ptr + angle) + patch * QUARTER
    cos = tl.load(rope_ptr, live, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(rope_ptr + count * QUARTER, live, other=0.0).to(tl.float32)
    sin = tl.where(low, -sin, sin)[None, :]
    other = _load_columns(source, heads + partner[None, :], live[None, :])
    x = rounded(x * scale * _load_columns(weight_ptr, column, live)[None, :], dtype, ROUND)
    other = rounded(other * scale * _load_columns(weight_ptr, partner, live)[None, :], dtype, ROUND)
    return rounded(x * cos, dtype, ROUND) + rounded(other * sin, dtype, ROUND)


@triton.jit(do_not_specialize=["count"])
def _prepare_tower_qkv(
    qkv_ptr, q_norm_ptr, k_norm_ptr, x_rope_ptr, y_rope_ptr, q_ptr, k_ptr, v_ptr, count, eps,
    HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    ROUND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One patch, whole heads in wide loads. A head is a part of MAIN columns and one of REST (64 and 8 of
    26B-A4B), so that few lanes are idle."""
    after_previous(OVERLAP)
    patch = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None] * D
    dtype = q_ptr.dtype.element_ty
    column = tl.arange(0, MAIN)
    live = column < D
    rest = MAIN + tl.arange(0, REST if REST else 1)
    rest_live = rest < D
    for part in tl.static_range(3):  # q, k, v
        source = qkv_ptr + (patch * 3 + part) * (HEADS * D)
        a = _load_columns(source, heads + column[None, :], live[None, :])
        squares = tl.sum(a * a, 1)
        if REST:
            b = _load_columns(source, heads + rest[None, :], rest_live[None, :])
            squares += tl.sum(b * b, 1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        out, weight = v_ptr, q_norm_ptr
        if part == 0:
            out = q_ptr
        if part == 1:
            out, weight = k_ptr, k_norm_ptr
        out += patch * (HEADS * D)
        if part == 2:
            a *= scale
        else:
            a = _turn(
                a, source, scale, heads, weight, x_rope_ptr, y_rope_ptr, patch, count, live,
                0, MAIN, D, dtype, ROUND,
            )  # fmt: skip
        tl.store(out + heads + column[None, :], a.to(dtype), live[None, :])
        if REST:
            if part == 2:
                b *= scale
            else:
                b = _turn(
                    b, source, scale, heads, weight, x_rope_ptr, y_rope_ptr, patch, count, rest_live,
                    MAIN, REST, D, dtype, ROUND,
                )  # fmt: skip
            tl.store(out + heads + rest[None, :], b.to(dtype), rest_live[None, :])


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
    tile = min(16, heads & -heads)
    main = 1 << (head.bit_length() - 1)
    rest = triton.next_power_of_2(head - main) if head > main else 0
    # 128 registers: 16 programs a processor; fused numerics would take 165
    _prepare_tower_qkv[(count, heads // tile)](
        qkv, q_norm, k_norm, x_rope, y_rope, q, k, v, count, eps,
        heads, head, tile, main, rest, backend.numerics == "reference", num_warps=1, maxnreg=128,
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
