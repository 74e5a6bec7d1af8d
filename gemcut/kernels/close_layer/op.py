"""Segment E: a layer's tail, up to the normed input of the next layer (spec 2.2 E1, E2; 2.4)."""

from __future__ import annotations

import torch

from gemcut.kernels.add_norm.op import rms_norm
from gemcut.kernels.backend import Backend
from gemcut.kernels.check import check, check_activation


def close_layer(
    x: torch.Tensor,
    d: torch.Tensor,
    post_weight: torch.Tensor,
    layer_scalar: torch.Tensor,
    next_weight: torch.Tensor,
    *,
    eps: float,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x' = (x + n(d; post_weight)) * layer_scalar, h = n(x'; next_weight).

    x: [T, H] residual stream. d: [T, H] output of the dense MLP. Weights: [H]; layer_scalar: [1].
    Returns (x' [T, H], h [T, H]).
    """
    _check("close_layer", x, d, layer_scalar, post_weight=post_weight, next_weight=next_weight)
    if backend.kernels == "triton":
        from gemcut.kernels.close_layer import triton as implementation

        return implementation.close_layer(
            x, d, post_weight, layer_scalar, next_weight, eps=eps, backend=backend
        )
    x = (x + rms_norm(d, post_weight, eps)) * layer_scalar
    return x, rms_norm(x, next_weight, eps)


def close_layer_moe(
    x: torch.Tensor,
    d: torch.Tensor,
    t: torch.Tensor,
    expert_weights: torch.Tensor,
    dense_weight: torch.Tensor,
    moe_weight: torch.Tensor,
    post_weight: torch.Tensor,
    layer_scalar: torch.Tensor,
    next_weight: torch.Tensor,
    *,
    eps: float,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The MoE layer's tail: combine the experts, three norms, residual, scalar, next norm.

    e = sum over k of expert_weights * t, in fp32, rounded once (spec 2.4);
    y = n(d; dense_weight) + n(e; moe_weight); x' = (x + n(y; post_weight)) * layer_scalar; h = n(x'; next).
    x, d: [T, H]. t: [T, K, H] outputs of each token's experts. expert_weights: [T, K] fp32.
    Weights: [H]; layer_scalar: [1]. Returns (x' [T, H], h [T, H]).
    """
    _check(
        "close_layer_moe",
        x,
        d,
        layer_scalar,
        dense_weight=dense_weight,
        moe_weight=moe_weight,
        post_weight=post_weight,
        next_weight=next_weight,
    )
    count, hidden = x.shape
    check("close_layer_moe", "t", t, (count, None, hidden), x.dtype, x.device)
    check("close_layer_moe", "expert_weights", expert_weights, t.shape[:2], torch.float32, x.device)
    if backend.kernels == "triton":
        from gemcut.kernels.close_layer import triton as implementation

        return implementation.close_layer_moe(
            x, d, t, expert_weights, dense_weight, moe_weight, post_weight, layer_scalar, next_weight,
            eps=eps, backend=backend,
        )  # fmt: skip
    e = (t.float() * expert_weights[:, :, None]).sum(dim=1).to(x.dtype)
    y = rms_norm(d, dense_weight, eps) + rms_norm(e, moe_weight, eps)
    x = (x + rms_norm(y, post_weight, eps)) * layer_scalar
    return x, rms_norm(x, next_weight, eps)


def _check(
    operation: str, x: torch.Tensor, d: torch.Tensor, layer_scalar: torch.Tensor, **weights: torch.Tensor
) -> None:
    check_activation(operation, "x", x, 2)
    check(operation, "d", d, x.shape, x.dtype, x.device)
    check(operation, "layer_scalar", layer_scalar, (1,), x.dtype, x.device)
    for name, weight in weights.items():
        check(operation, name, weight, x.shape[-1:], x.dtype, x.device)
