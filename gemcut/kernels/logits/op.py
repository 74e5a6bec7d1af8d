"""Segment Z: the tied head, its soft cap (spec 2.1), and what sampling needs to know of the logits first."""

from __future__ import annotations

import torch
from torch.nn import functional

from gemcut.kernels.backend import Backend
from gemcut.kernels.check import check, check_activation
from gemcut.kernels.linear.reference import product

BLOCK = 128  # logits that share one maximum


def num_blocks(vocab: int) -> int:
    """How many maxima a row of `vocab` logits has; the last block may be shorter than the others."""
    return -(-vocab // BLOCK)


def logits(
    h: torch.Tensor, weight: torch.Tensor, *, softcap: float | None, backend: Backend
) -> tuple[torch.Tensor, torch.Tensor]:
    """softcap * tanh(h E^T / softcap), rounded three times in the model's dtype, as fp32 for the sampler.

    h: [R, H], normed by the last layer's tail. weight: [V, H], the embedding.
    Returns (logits [R, V] fp32, their maxima [R, B] fp32 as `block_maxima` has them).
    """
    check_activation("logits", "h", h, 2)
    check("logits", "weight", weight, (None, h.shape[1]), h.dtype, h.device)
    if backend.kernels == "triton":
        from gemcut.kernels.logits import triton as implementation

        return implementation.logits(h, weight, softcap=softcap, backend=backend)
    z = product(h, weight, backend.deterministic)
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    z = z.float()
    return z, _maxima(z)


def block_maxima(logits: torch.Tensor, *, backend: Backend) -> torch.Tensor:
    """The largest logit of every BLOCK columns, NaN if one of them is: of logits that were edited.

    logits: [R, V] fp32. Returns [R, B] fp32, B = ceil(V / BLOCK).
    """
    check("block_maxima", "logits", logits, (None, None), torch.float32, logits.device)
    if backend.kernels == "triton":
        from gemcut.kernels.logits import triton as implementation

        return implementation.block_maxima(logits)
    return _maxima(logits)


def _maxima(logits: torch.Tensor) -> torch.Tensor:
    rows, vocab = logits.shape
    padded = functional.pad(logits, (0, num_blocks(vocab) * BLOCK - vocab), value=float("-inf"))
    return padded.view(rows, num_blocks(vocab), BLOCK).amax(dim=-1)
