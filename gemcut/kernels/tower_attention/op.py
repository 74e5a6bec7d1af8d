"""Attention of the vision tower, over the packed patches of several pictures (spec 4.2)."""

from __future__ import annotations

from itertools import pairwise

import torch

from gemcut.kernels.backend import Backend
from gemcut.kernels.check import check, check_activation


def tower_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, *, backend: Backend
) -> torch.Tensor:
    """Bidirectional attention within each picture, scale 1.0.

    q, k, v: [N, heads, D], pictures one after another. starts: [B + 1] int32, picture b owns patches
    [starts[b], starts[b + 1]). Returns [N, heads, D].
    """
    check_activation("tower_attention", "q", q, 3)
    check("tower_attention", "k", k, q.shape, q.dtype, q.device)
    check("tower_attention", "v", v, q.shape, q.dtype, q.device)
    check("tower_attention", "starts", starts, (None,), torch.int32, q.device)
    if backend.kernels == "triton":
        from gemcut.kernels.tower_attention import triton as implementation

        return implementation.tower_attention(q, k, v, starts)
    bounds = starts.tolist()
    out = torch.empty_like(q)
    for start, stop in pairwise(bounds):
        # fp32 inside, one rounding; products and softmax one by one, as the reference's eager attention
        queries, keys, values = (part[start:stop].transpose(0, 1).float() for part in (q, k, v))
        scores = queries @ keys.transpose(1, 2)  # [heads, n, n]
        out[start:stop] = (scores.softmax(dim=-1) @ values).transpose(0, 1).to(q.dtype)
    return out
