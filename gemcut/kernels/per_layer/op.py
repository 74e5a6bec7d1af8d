"""What per-layer inputs add to a layer of E2B and E4B: segments S1, P1 and P2 (spec 2.5, 2.6).

P3, the tail of such a layer, is `close_layer` with the projection in the place of the dense MLP's output.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from gemcut.kernels.add_norm.op import rms_norm
from gemcut.kernels.backend import Backend
from gemcut.kernels.check import INTS, check, check_activation


def per_layer_inputs(
    projected: torch.Tensor,
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    soft_rows: torch.Tensor | None,
    norm_weight: torch.Tensor,
    *,
    hidden: int,
    pad_id: int,
    eps: float,
    backend: Backend,
) -> torch.Tensor:
    """S1: (n(projected * H^-1/2; norm_weight) + weight[id] * sqrt(W)) * 2^-1/2, rounded after every step.

    projected: [T, L W], the model's projection of its L layers' inputs, of width W each, from the embeddings.
    token_ids: [T] int; soft_rows: [T] int or None, -1 but for soft tokens, which have the id `pad_id` here.
    weight: [V, L W] embeddings. norm_weight: [W]. hidden: the model's width H.
    Returns [L, T, W], one slice a layer.
    """
    operation = "per_layer_inputs"
    check_activation(operation, "projected", projected, 2)
    (count, total), device = projected.shape, projected.device
    check(operation, "token_ids", token_ids, (count,), INTS, device)
    check(operation, "weight", weight, (None, total), projected.dtype, device)
    check(operation, "norm_weight", norm_weight, (None,), projected.dtype, device)
    if soft_rows is not None:
        check(operation, "soft_rows", soft_rows, (count,), INTS, device)
    width = norm_weight.shape[0]
    if width == 0 or total % width:
        raise ValueError(
            f"{operation}: norm_weight must have a length that divides the {total} columns of projected, "
            f"got {width}"
        )
    if backend.kernels == "triton":
        from gemcut.kernels.per_layer import triton as implementation

        return implementation.per_layer_inputs(
            projected, token_ids, weight, soft_rows, norm_weight,
            hidden=hidden, pad_id=pad_id, eps=eps, backend=backend,
        )  # fmt: skip
    ids = token_ids if soft_rows is None else token_ids.masked_fill(soft_rows >= 0, pad_id)
    embedded = weight[ids] * float(torch.tensor(width**0.5, dtype=weight.dtype))
    normed = rms_norm((projected * hidden**-0.5).view(count, -1, width), norm_weight, eps)
    inputs = (normed + embedded.view(count, -1, width)) * 2**-0.5
    return inputs.transpose(0, 1).contiguous()


def add_normed(
    x: torch.Tensor, d: torch.Tensor, post_weight: torch.Tensor, *, eps: float, backend: Backend
) -> torch.Tensor:
    """P1: x + n(d; post_weight), which the gate reads as it is.

    x: [T, H] residual stream. d: [T, H] output of the dense MLP. post_weight: [H]. Returns [T, H].
    """
    check_activation("add_normed", "x", x, 2)
    check("add_normed", "d", d, x.shape, x.dtype, x.device)
    check("add_normed", "post_weight", post_weight, x.shape[-1:], x.dtype, x.device)
    if backend.kernels == "triton":
        from gemcut.kernels.per_layer import triton as implementation

        return implementation.add_normed(x, d, post_weight, eps=eps, backend=backend)
    return x + rms_norm(d, post_weight, eps)


def gate_per_layer(gate: torch.Tensor, inputs: torch.Tensor, *, backend: Backend) -> torch.Tensor:
    """P2: gelu_tanh(gate) * inputs, the activation rounded before the product.

    gate: [T, W], the stream's projection. inputs: [T, W], the layer's slice of `per_layer_inputs`.
    Returns [T, W].
    """
    check_activation("gate_per_layer", "gate", gate, 2)
    check("gate_per_layer", "inputs", inputs, gate.shape, gate.dtype, gate.device)
    if backend.kernels == "triton":
        from gemcut.kernels.per_layer import triton as implementation

        return implementation.gate_per_layer(gate, inputs, backend=backend)
    return functional.gelu(gate, approximate="tanh") * inputs
