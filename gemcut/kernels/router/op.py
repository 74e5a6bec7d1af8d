"""The router of the mixture of experts: who goes where, and in which order (spec 2.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from gemcut.kernels.backend import Backend
from gemcut.kernels.check import check, check_activation
from gemcut.kernels.linear.reference import product


@dataclass(frozen=True, eq=False, slots=True)
class Routing:
    """Which experts each token goes to, and the order in which grouped products visit the pairs.

    weights: [T, K] fp32. experts: [T, K] int64. order: [T * K] int64, the flat (token, slot) pairs
    sorted by expert, tokens ascending within one, those of padding last. offsets: [E + 1] int64, expert e
    owns order[offsets[e] : offsets[e + 1]].
    """

    weights: torch.Tensor
    experts: torch.Tensor
    order: torch.Tensor
    offsets: torch.Tensor


def route_experts(
    r: torch.Tensor,
    weight: torch.Tensor,
    per_expert_scale: torch.Tensor,
    count: torch.Tensor,
    *,
    top_k: int,
    backend: Backend,
) -> Routing:
    """Router product, softmax over all experts, top k, renormalise, times per_expert_scale.

    r: [T, H] router input. weight: [E, H]. per_expert_scale: [E]. count: [1] int32, tokens that are real;
    the rows behind are padding: they go to no expert, and whatever is in them harms nobody (their
    experts are valid ids, their weights mean nothing). The logits
    are rounded to the activation dtype, everything after is fp32; ties go to the lowest expert (spec 10,
    items 8, 9).
    """
    check_activation("route_experts", "r", r, 2)
    check("route_experts", "weight", weight, (None, r.shape[1]), r.dtype, r.device)
    check("route_experts", "per_expert_scale", per_expert_scale, weight.shape[:1], r.dtype, r.device)
    check("route_experts", "count", count, (1,), torch.int32, r.device)
    if backend.kernels == "triton":
        from gemcut.kernels.router import triton as implementation

        return implementation.route_experts(r, weight, per_expert_scale, count, top_k=top_k, backend=backend)
    probabilities = product(r, weight, backend.deterministic).float().softmax(dim=-1)
    ranked, index = probabilities.sort(dim=-1, descending=True, stable=True)
    weights, experts = ranked[:, :top_k], index[:, :top_k]
    weights = weights / weights.sum(dim=-1, keepdim=True) * per_expert_scale[experts].float()
    real = torch.arange(r.shape[0], device=r.device) < count
    flat = experts.masked_fill(~real[:, None], weight.shape[0]).flatten()  # padding sorts behind all
    counts = torch.bincount(flat, minlength=weight.shape[0] + 1)[:-1]
    offsets = functional.pad(counts.cumsum(0), (1, 0))
    return Routing(weights.contiguous(), experts.contiguous(), flat.argsort(stable=True), offsets)
