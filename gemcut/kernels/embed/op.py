"""Segment S0: the start of the residual stream (spec 2.1, 4.5)."""

from __future__ import annotations

import torch

from gemcut.kernels.add_norm.op import rms_norm
from gemcut.kernels.backend import Backend
from gemcut.kernels.check import INTS, check, check_activation


def embed(
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    soft: torch.Tensor | None,
    soft_rows: torch.Tensor | None,
    next_weight: torch.Tensor,
    *,
    eps: float,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather embedding rows times bf(sqrt(H)), put soft tokens in their places, norm for the first layer.

    token_ids: [T] int; rows of soft tokens may hold any valid id. weight: [V, H].
    soft: [S, H] soft tokens, not scaled (spec 4.3); soft_rows: [T] int, row of `soft` or -1. Both or none.
    next_weight: [H]. Returns (x [T, H], h [T, H]).
    """
    check_activation("embed", "weight", weight, 2)
    check("embed", "token_ids", token_ids, (None,), INTS, weight.device)
    check("embed", "next_weight", next_weight, weight.shape[1:], weight.dtype, weight.device)
    hidden = weight.shape[1]
    if (soft is None) != (soft_rows is None):
        raise ValueError("embed: soft and soft_rows, its places, come both or not at all")
    if soft is not None and soft_rows is not None:
        check("embed", "soft", soft, (None, hidden), weight.dtype, weight.device)
        check("embed", "soft_rows", soft_rows, token_ids.shape, INTS, weight.device)
    if backend.kernels == "triton":
        from gemcut.kernels.embed import triton as implementation

        return implementation.embed(token_ids, weight, soft, soft_rows, next_weight, eps=eps, backend=backend)
    # rounded to the weight's dtype before the product: 53.0 for 26B-A4B in bf16 (spec 10, item 1)
    x = weight[token_ids] * float(torch.tensor(hidden**0.5, dtype=weight.dtype))
    if soft is not None and soft_rows is not None:
        x = torch.where((soft_rows >= 0)[:, None], soft[soft_rows.clamp(min=0)], x)
    return x, rms_norm(x, next_weight, eps)
