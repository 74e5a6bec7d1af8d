"""Segment C: residual add and the norms around it, between two products (spec 2.6)."""

from __future__ import annotations

import torch

from gemcut.kernels.backend import Backend
from gemcut.kernels.check import check, check_activation


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """n(x; w) over the last dimension: fp32 inside, the weight included, one rounding (spec 2.1)."""
    wide = x.float()
    out = wide * wide.square().mean(-1, keepdim=True).add_(eps).pow_(-0.5)
    if weight is not None:
        out *= weight.float()
    return out.to(x.dtype)


def add_norm(
    x: torch.Tensor,
    a: torch.Tensor,
    post_weight: torch.Tensor,
    next_weight: torch.Tensor,
    *,
    eps: float,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x1 = x + n(a; post_weight), h = n(x1; next_weight).

    x: [T, H] residual stream. a: [T, H] output of the projection. Weights: [H].
    Returns (x1 [T, H], h [T, H]). Segment C of the decoder, and every tail of the vision tower.
    """
    _check("add_norm", x, a, post_weight=post_weight, next_weight=next_weight)
    if backend.kernels == "triton":
        from gemcut.kernels.add_norm import triton as implementation

        return implementation.add_norm(x, a, post_weight, next_weight, eps=eps, backend=backend)
    x1 = x + rms_norm(a, post_weight, eps)
    return x1, rms_norm(x1, next_weight, eps)


def add_norm_moe(
    x: torch.Tensor,
    a: torch.Tensor,
    post_weight: torch.Tensor,
    next_weight: torch.Tensor,
    router_scale: torch.Tensor,
    expert_weight: torch.Tensor,
    *,
    eps: float,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Segment C-MoE: one residual, three normed readings of it.

    x, a: [T, H]. Weights and router_scale: [H].
    Returns x1 = x + n(a; post_weight), h = n(x1; next_weight) for the dense MLP,
    r = (n(x1) * router_scale) * H^-1/2 for the router (two roundings in this order, spec 2.4),
    e = n(x1; expert_weight) for the experts; all [T, H].
    """
    _check(
        "add_norm_moe",
        x,
        a,
        post_weight=post_weight,
        next_weight=next_weight,
        router_scale=router_scale,
        expert_weight=expert_weight,
    )
    if backend.kernels == "triton":
        from gemcut.kernels.add_norm import triton as implementation

        return implementation.add_norm_moe(
            x, a, post_weight, next_weight, router_scale, expert_weight, eps=eps, backend=backend
        )
    x1 = x + rms_norm(a, post_weight, eps)
    normed = rms_norm(x1.float(), None, eps)  # one for three; each is rounded once
    r = normed.to(x.dtype) * router_scale * x.shape[-1] ** -0.5
    h, e = ((normed * weight.float()).to(x.dtype) for weight in (next_weight, expert_weight))
    return x1, h, r, e


def _check(operation: str, x: torch.Tensor, a: torch.Tensor, **weights: torch.Tensor) -> None:
    check_activation(operation, "x", x, 2)
    check(operation, "a", a, x.shape, x.dtype, x.device)
    for name, weight in weights.items():
        check(operation, name, weight, x.shape[-1:], x.dtype, x.device)
