"""The draw in plain torch, over the sorted vocabulary. It never waits for the device."""

from __future__ import annotations

import torch

# Probabilities are whole multiples of the likeliest one's 2^-40: their sums are exact in any order, and fit
# into 64 bits for a vocabulary of up to 2^22.
UNIT = 2.0**40


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """One token a row; arguments as in `sample`."""
    warm = temperature > 0
    scaled = logits / torch.where(warm, temperature, 1.0)[:, None]
    ranked, ids = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ranked.shape[1], device=logits.device)
    weight = (ranked - ranked[:, :1]).exp().nan_to_num(0.0)  # of the likeliest token's; banned rows have none
    mass = (weight * UNIT).long().masked_fill(rank >= torch.where(warm, top_k, 1)[:, None], 0)
    before = mass.cumsum(dim=-1) - mass
    total = mass.sum(dim=-1)
    # a token stays while the mass before it is below top_p of all, so the first one always stays
    enough = torch.where(top_p < 1, (top_p.double() * total).ceil().long().clamp(min=1), total)
    kept = (before < enough[:, None]) & (weight >= min_p[:, None])
    by_id = torch.zeros_like(mass).scatter_(-1, ids, mass.masked_fill(~kept, 0))
    cumulative = by_id.cumsum(dim=-1)
    total = cumulative[:, -1]
    # the product may round up to the total
    point = torch.minimum((uniform * total).long(), total - 1)
    return torch.searchsorted(cumulative, point[:, None], right=True).squeeze(-1)
