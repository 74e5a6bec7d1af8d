"""Segment D: the gated activation between gate/up and down (spec 2.2)."""

from __future__ import annotations

import torch
from torch.nn import functional

from gemcut.kernels.backend import Backend
from gemcut.kernels.check import check_activation


def glu(gate_up: torch.Tensor, *, backend: Backend) -> torch.Tensor:
    """gelu_tanh(gate) * up, the activation rounded before the product (spec 10, item 12).

    gate_up: [T, 2I], gate in the first I columns. Returns [T, I].
    """
    check_activation("glu", "gate_up", gate_up, 2)
    if gate_up.shape[1] % 2:
        raise ValueError(f"glu: gate_up must have an even number of columns, got {gate_up.shape[1]}")
    if backend.kernels == "triton":
        from gemcut.kernels.glu import triton as implementation

        return implementation.glu(gate_up, backend=backend)
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up
