"""Inverse frequencies of the rotary embeddings (spec 2.1, 4.2)."""

from __future__ import annotations

from functools import cache

import torch

from gemcut.plan import Rope


@cache  # one tensor for all steps: it depends on neither
def text_inv_freq(rope: Rope, device: torch.device) -> torch.Tensor:
    """theta^(-2i/D) for the angles that turn; fp32 [live_angles].

    The denominator is the whole head size, also where only a quarter of the angles turns.
    """
    exponent = torch.arange(0, 2 * rope.live_angles, 2, dtype=torch.float32, device=device) / rope.head_dim
    return 1.0 / rope.theta**exponent


def tower_inv_freq(theta: float, head_dim: int, device: torch.device) -> torch.Tensor:
    """theta^(-2i/(D/2)) for i < D/4: each half of the head turns by one coordinate; fp32 [D/4]."""
    half = head_dim // 2
    return 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
