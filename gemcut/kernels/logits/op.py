"""Segment Z: the tied head and its soft cap (spec 2.1)."""

from __future__ import annotations

import torch

from gemcut.kernels.backend import Backend
from gemcut.kernels.check import check, check_activation
from gemcut.kernels.linear.reference import product


def logits(h: torch.Tensor, weight: torch.Tensor, *, softcap: float | None, backend: Backend) -> torch.Tensor:
    """softcap * tanh(h E^T / softcap), rounded three times in the model's dtype, as fp32 for the sampler.

    h: [R, H], normed by the last layer's tail. weight: [V, H], the embedding. Returns [R, V] fp32.
    """
    check_activation("logits", "h", h, 2)
    check("logits", "weight", weight, (None, h.shape[1]), h.dtype, h.device)
    if backend.kernels == "triton":
        from gemcut.kernels.logits import triton as implementation

        return implementation.logits(h, weight, softcap=softcap, backend=backend)
    z = product(h, weight, backend.deterministic)
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    return z.float()
