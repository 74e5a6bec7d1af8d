"""Choosing the next token (spec 6.2): temperature, then top-k, top-p and min-p, then one draw a row."""

from __future__ import annotations

import torch

from gemcut.kernels.backend import Backend
from gemcut.kernels.check import check


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    *,
    backend: Backend,
) -> torch.Tensor:
    """Sample one token id for each row.

    logits: [R, V] fp32, suppressed ids at -inf. temperature: [R] fp32, 0 means greedy.
    top_k: [R] int64, V to keep all. top_p, min_p: [R] fp32, 1 and 0 to keep all.
    uniform: [R] fp64 in [0, 1): the row's random number; the draw is the inverse of the cumulative
    distribution in order of falling probability, so a row's token depends on its own number alone.
    Ties go to the lowest id. Returns [R] int64.
    """
    rows, device = logits.shape[0], logits.device
    check("sample", "logits", logits, (None, None), torch.float32, device)
    for name, tensor in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        check("sample", name, tensor, (rows,), torch.float32, device)
    check("sample", "uniform", uniform, (rows,), torch.float64, device)
    check("sample", "top_k", top_k, (rows,), torch.int64, device)
    greedy = logits.argmax(dim=-1)
    warm = temperature > 0
    if not bool(warm.any()):
        return greedy
    # the likeliest at 0: however low the temperature, it stays finite and the others fall behind it
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / torch.where(warm, temperature, 1.0)[:, None]
    ranked, ids = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ranked.shape[1], device=device)
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
    chosen = ids.gather(-1, torch.minimum(drawn, last)).squeeze(-1)
    return torch.where(warm, chosen, greedy)
