"""Rotary tables of one step: computed once for each layer kind, read by all its layers (spec 2.1)."""

from __future__ import annotations

import torch

from gemcut.kernels.backend import Backend
from gemcut.kernels.check import INTS, check


def rope_table(
    positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype, *, backend: Backend
) -> torch.Tensor:
    """cos and sin of positions * inv_freq: fp32 inside, then cast to the activation dtype.

    positions: [T] int. inv_freq: [A] fp32, the angles that turn (never derived from a bf16 buffer:
    positions reach 262,143). Returns [2, T, A], cos first.
    """
    check("rope_table", "inv_freq", inv_freq, (None,), torch.float32, positions.device)
    check("rope_table", "positions", positions, (None,), INTS, positions.device)
    if backend.kernels == "triton":
        from gemcut.kernels.rope import triton as implementation

        return implementation.rope_table(positions, inv_freq, dtype, backend=backend)
    angles = positions.float()[:, None] * inv_freq
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + D/2) of each head for i < A; the other dimensions pass through.

    x: [T, heads, D]. table: [2, T, A], A <= D/2. Three roundings, as the reference (spec 10, item 3).
    """
    cos, sin = table[:, :, None]  # [T, 1, A] each
    angles, half = table.shape[-1], x.shape[-1] // 2
    low, high = x[..., :angles], x[..., half : half + angles]
    turned_low = low * cos - high * sin
    turned_high = high * cos + low * sin
    if angles == half:
        return torch.cat([turned_low, turned_high], dim=-1)
    return torch.cat([turned_low, x[..., angles:half], turned_high, x[..., half + angles :]], dim=-1)
