"""The experts: two grouped products around the gated activation (spec 2.4)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn import functional

from gemcut.kernels.backend import Backend
from gemcut.kernels.check import check, check_activation
from gemcut.kernels.linear.reference import product
from gemcut.kernels.router.op import Routing


def grouped_glu(
    h: torch.Tensor, gate_up: torch.Tensor, routing: Routing, *, backend: Backend
) -> torch.Tensor:
    """First expert product with its activation: gelu_tanh(gate) * up for each (token, slot) pair.

    h: [T, H]; rows are gathered here. gate_up: [E, 2I, H], gate rows first.
    Returns [T * K, I] in the order of `routing.order`.
    """
    check_activation("grouped_glu", "h", h, 2)
    check("grouped_glu", "gate_up", gate_up, (None, None, h.shape[1]), h.dtype, h.device)
    if gate_up.shape[1] % 2:
        raise ValueError(f"grouped_glu: gate_up must have an even number of rows, got {gate_up.shape[1]}")
    _check_routing("grouped_glu", routing, h.shape[0], gate_up.shape[0], h.device)
    if backend.kernels == "triton":
        from gemcut.kernels.experts import triton as implementation

        return implementation.grouped_glu(h, gate_up, routing, backend=backend)
    rows = h.index_select(0, routing.order // routing.experts.shape[1])
    out = rows.new_empty(rows.shape[0], gate_up.shape[1])
    for expert, start, stop in _groups(routing):
        out[start:stop] = product(rows[start:stop], gate_up[expert], backend.deterministic)
    gate, up = out.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


def grouped_linear(
    m: torch.Tensor, down: torch.Tensor, routing: Routing, *, backend: Backend
) -> torch.Tensor:
    """Second expert product. m: [T * K, I] in the order of `routing.order`; down: [E, H, I].

    routing is what `grouped_glu`, the call before this one, was given: on a GPU it is read before m is there.
    Returns t [T, K, H]: every token's expert outputs, in slot order.
    """
    check_activation("grouped_linear", "m", m, 2)
    check("grouped_linear", "down", down, (None, None, m.shape[1]), m.dtype, m.device)
    _check_routing("grouped_linear", routing, None, down.shape[0], m.device)
    check("grouped_linear", "m", m, (routing.order.shape[0], None), m.dtype, m.device)
    if backend.kernels == "triton":
        from gemcut.kernels.experts import triton as implementation

        return implementation.grouped_linear(m, down, routing, backend=backend)
    out = m.new_empty(m.shape[0], down.shape[1])
    for expert, start, stop in _groups(routing):
        out[start:stop] = product(m[start:stop], down[expert], backend.deterministic)
    return torch.empty_like(out).index_copy_(0, routing.order, out).view(*routing.experts.shape, -1)


def _check_routing(
    operation: str, routing: Routing, tokens: int | None, experts: int, device: torch.device
) -> None:
    check(operation, "routing.experts", routing.experts, (tokens, None), torch.int64, device)
    check(operation, "routing.weights", routing.weights, routing.experts.shape, torch.float32, device)
    check(operation, "routing.order", routing.order, (routing.experts.numel(),), torch.int64, device)
    check(operation, "routing.offsets", routing.offsets, (experts + 1,), torch.int64, device)


def _groups(routing: Routing) -> list[tuple[int, int, int]]:
    """(expert, start, stop) of every expert that has rows."""
    bounds = routing.offsets.tolist()
    return [(e, start, stop) for e, (start, stop) in enumerate(pairwise(bounds)) if start < stop]
