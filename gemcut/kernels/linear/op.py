"""The dense matrix product."""

from __future__ import annotations

import torch

from gemcut.kernels.backend import Backend
from gemcut.kernels.check import check, check_activation
from gemcut.kernels.linear.reference import product


def linear(x: torch.Tensor, weight: torch.Tensor, *, backend: Backend) -> torch.Tensor:
    """x W^T. x: [T, K]; weight: [N, K] of the same dtype. Returns [T, N]."""
    check_activation("linear", "x", x, 2)
    check("linear", "weight", weight, (None, x.shape[1]), x.dtype, x.device)
    if backend.kernels == "triton":
        from gemcut.kernels.linear import hopper
        from gemcut.kernels.linear import triton as implementation

        if backend.deterministic:
            return implementation.linear(x, weight)
        if x.shape[0] == 1:
            return implementation.single(x, weight)
        if hopper.serves(x, weight):
            return hopper.streamed(x, weight)
    # for many rows cuBLAS is as good as it gets
    return product(x, weight, backend.deterministic)
