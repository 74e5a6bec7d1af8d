"""The vision tower's segments between products, over the packed patches of pictures (spec 4.2, 4.3)."""

from __future__ import annotations

from itertools import pairwise

import torch

from gemcut.data import pixel_values
from gemcut.kernels.add_norm.op import rms_norm
from gemcut.kernels.backend import Backend
from gemcut.kernels.check import INTS, check, check_activation
from gemcut.kernels.rope.op import rotate


def scale_patches(pixels: torch.Tensor, dtype: torch.dtype, *, backend: Backend) -> torch.Tensor:
    """2 (px - 0.5) in fp32, then cast. pixels: [N, 768] uint8. Returns [N, 768]."""
    check("scale_patches", "pixels", pixels, (None, None), torch.uint8, pixels.device)
    if backend.kernels == "triton":
        from gemcut.kernels.tower import triton as implementation

        return implementation.scale_patches(pixels, dtype, backend=backend)
    values = torch.from_numpy(pixel_values()).to(pixels.device)
    return (2 * (values - 0.5)).to(dtype).index_select(0, pixels.flatten().int()).view(pixels.shape)


def add_positions(
    x: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    next_weight: torch.Tensor,
    *,
    eps: float,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + (table[0][px] + table[1][py]), the table sum rounded first; then the first layer's norm.

    x: [N, H] patch projection. table: [2, P, H]. positions: [N, 2] int, (x, y). next_weight: [H].
    Returns (x [N, H], h [N, H]).
    """
    check_activation("add_positions", "x", x, 2)
    check("add_positions", "table", table, (2, None, x.shape[1]), x.dtype, x.device)
    check("add_positions", "positions", positions, (x.shape[0], 2), INTS, x.device)
    check("add_positions", "next_weight", next_weight, x.shape[1:], x.dtype, x.device)
    if backend.kernels == "triton":
        from gemcut.kernels.tower import triton as implementation

        return implementation.add_positions(x, table, positions, next_weight, eps=eps, backend=backend)
    x = x + (table[0][positions[:, 0]] + table[1][positions[:, 1]])
    return x, rms_norm(x, next_weight, eps)


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
    """Norm q, k, v per head; turn the first half of each head by the column, the second by the row.

    qkv: [N, 3 heads D]. q_norm, k_norm: [D]. x_rope, y_rope: [2, N, D/4].
    Returns q, k, v, each [N, heads, D].
    """
    check_activation("prepare_tower_qkv", "qkv", qkv, 2)
    count, head = qkv.shape[0], q_norm.shape[0]
    check("prepare_tower_qkv", "q_norm", q_norm, (head,), qkv.dtype, qkv.device)
    check("prepare_tower_qkv", "k_norm", k_norm, (head,), qkv.dtype, qkv.device)
    for name, table in (("x_rope", x_rope), ("y_rope", y_rope)):
        check("prepare_tower_qkv", name, table, (2, count, head // 4), qkv.dtype, qkv.device)
    if qkv.shape[1] % (3 * head):
        raise ValueError(
            f"prepare_tower_qkv: qkv must have 3 columns for each head of {head}, got {qkv.shape[1]}"
        )
    if backend.kernels == "triton":
        from gemcut.kernels.tower import triton as implementation

        return implementation.prepare_tower_qkv(qkv, q_norm, k_norm, x_rope, y_rope, eps=eps, backend=backend)
    q, k, v = qkv.view(count, 3, -1, head).unbind(dim=1)

    def turn(part: torch.Tensor) -> torch.Tensor:
        left, right = part.chunk(2, dim=-1)
        return torch.cat([rotate(left, x_rope), rotate(right, y_rope)], dim=-1)

    return turn(rms_norm(q, q_norm, eps)), turn(rms_norm(k, k_norm, eps)), rms_norm(v, None, eps)


def pool_patches(
    x: torch.Tensor,
    cells: torch.Tensor,
    starts: torch.Tensor,
    std_bias: torch.Tensor | None,
    std_scale: torch.Tensor | None,
    *,
    eps: float,
    backend: Backend,
) -> torch.Tensor:
    """Mean of each cell's nine patches, times sqrt(H), standardised, then the projector's unscaled norm.

    x: [N, H]. cells: [S, 9] int, the patches of each soft token. starts: [B + 1] int32, picture b owns
    patches [starts[b], starts[b + 1]) and their ninth of the cells. std_bias, std_scale: [H], both or
    none. Rounded after the mean, after the standardisation and after the norm (spec 4.3).
    Returns [S, H].
    """
    check_activation("pool_patches", "x", x, 2)
    check("pool_patches", "cells", cells, (None, 9), INTS, x.device)
    check("pool_patches", "starts", starts, (None,), torch.int32, x.device)
    if (std_bias is None) != (std_scale is None):
        raise ValueError("pool_patches: std_bias and std_scale come both or not at all")
    if std_bias is not None and std_scale is not None:
        check("pool_patches", "std_bias", std_bias, x.shape[1:], x.dtype, x.device)
        check("pool_patches", "std_scale", std_scale, x.shape[1:], x.dtype, x.device)
    if backend.kernels == "triton":
        from gemcut.kernels.tower import triton as implementation

        return implementation.pool_patches(x, cells, std_bias, std_scale, eps=eps, backend=backend)
    bounds = starts.tolist()
    pictures = [
        _mean(x[start:stop], cells[start // 9 : stop // 9] - start) for start, stop in pairwise(bounds)
    ]
    pooled = torch.cat(pictures).to(x.dtype).float() * x.shape[1] ** 0.5
    if std_bias is not None and std_scale is not None:
        pooled = (pooled - std_bias.float()) * std_scale.float()
    return rms_norm(pooled.to(x.dtype), None, eps)


def _mean(x: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """fp32 [s, H]: the mean of each cell of one picture, x [n, H].

    As one product with a sparse matrix of ninths, which is how the reference sums: equal bit by bit.
    """
    ninths = x.new_zeros(cells.shape[0], x.shape[0], dtype=torch.float32)
    return ninths.scatter_(1, cells.long(), 1 / 9) @ x.float()
