"""The draw in plain torch, over the sorted vocabulary. It never waits for the device."""

from __future__ import annotations

import torch


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
    ranked = ranked.masked_fill(rank >= top_k[:, None], float("-inf"))
    probabilities = ranked.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # a token stays while the mass before it is below top_p, so the first one always stays; in fp32 the
    # mass before a rare one may round to 1
    within = (before < top_p[:, None]) | (top_p >= 1)[:, None]
    kept = within & (probabilities >= min_p[:, None] * probabilities[:, :1])
    probabilities = torch.where(kept, probabilities, 0.0)
    cumulative = probabilities.double().cumsum(dim=-1)
    drawn = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    # rounding may carry a draw past the end: the last kept token is meant
    last = (kept & (probabilities > 0)).long().cumsum(dim=-1).argmax(dim=-1, keepdim=True)
    place = torch.where(warm[:, None], torch.minimum(drawn, last), 0)
    return ids.gather(-1, place).squeeze(-1)
