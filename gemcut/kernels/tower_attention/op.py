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
        # fp32 inside, one rounding; products and softmax one by one, as the reference's eager attention. Head
        # by head: the scores of all at once leave a CPU's caches, and for 10,080 patches take 6.5 GB.
        for head in range(q.shape[1]):
            queries, keys, values = (part[start:stop, head].float() for part in (q, k, v))
            out[start:stop, head] = (queries @ keys.t()).softmax(dim=-1) @ values
    return out
