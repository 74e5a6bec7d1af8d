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
    top_k = routing.experts.shape[1]
    out = h.new_empty(routing.order.shape[0], gate_up.shape[1] // 2)
    for expert, start, stop in _groups(routing):
        rows = routing.order[start:stop] // top_k
        gate, up = product(h[rows], gate_up[expert], backend.deterministic).chunk(2, dim=-1)
        out[start:stop] = functional.gelu(gate, approximate="tanh") * up
    return out


def grouped_linear(
    m: torch.Tensor, down: torch.Tensor, routing: Routing, *, backend: Backend
) -> torch.Tensor:
    """Second expert product. m: [T * K, I] in the order of `routing.order`; down: [E, H, I].

    Returns t [T, K, H]: every token's expert outputs, in slot order.
    """
    check_activation("grouped_linear", "m", m, 2)
    check("grouped_linear", "down", down, (None, None, m.shape[1]), m.dtype, m.device)
    out = m.new_empty(m.shape[0], down.shape[1])
    for expert, start, stop in _groups(routing):
        out[routing.order[start:stop]] = product(m[start:stop], down[expert], backend.deterministic)
    return out.view(*routing.experts.shape, -1)


def _groups(routing: Routing) -> list[tuple[int, int, int]]:
    """(expert, start, stop) of every expert that has rows."""
    bounds = routing.offsets.tolist()
    return [(e, start, stop) for e, (start, stop) in enumerate(pairwise(bounds)) if start < stop]
