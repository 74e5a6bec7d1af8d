"""Choosing the next token (spec 6.2): temperature, then top-k, top-p and min-p, then one draw a row."""

from __future__ import annotations

import torch

from gemcut.kernels.backend import Backend
from gemcut.kernels.check import check
from gemcut.kernels.logits.op import num_blocks
from gemcut.kernels.sample.reference import draw


def sample(
    logits: torch.Tensor,
    maxima: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    *,
    max_top_k: int | None = None,
    backend: Backend,
) -> torch.Tensor:
    """Sample one token id for each row.

    logits: [R, V] fp32, suppressed ids at -inf. maxima: [R, B] fp32, `block_maxima` of these very logits:
    where logits are edited, they are taken again.
    temperature: [R] fp32, 0 means greedy. top_k: [R] int64, V to keep all.
    top_p, min_p: [R] fp32, 1 and 0 to keep all. Of equal logits the lowest ids are kept.
    uniform: [R] fp64 in [0, 1): the row's random number; the draw is the inverse of the cumulative
    distribution of what is kept, in order of ids, so a row's token depends on its own number alone, and a
    small change of the logits changes few draws.
    max_top_k: what the host knows of it: no row that is not greedy has a larger top_k; 0 says that all are
    greedy, None that nothing is known. It chooses the way, never the token.
    Returns [R] int64; rows without a number to choose get some id.
    """
    rows, device = logits.shape[0], logits.device
    check("sample", "logits", logits, (None, None), torch.float32, device)
    check("sample", "maxima", maxima, (rows, num_blocks(logits.shape[1])), torch.float32, device)
    for name, tensor in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        check("sample", name, tensor, (rows,), torch.float32, device)
    check("sample", "uniform", uniform, (rows,), torch.float64, device)
    check("sample", "top_k", top_k, (rows,), torch.int64, device)
    if backend.kernels == "triton":
        from gemcut.kernels.sample import triton as implementation

        return implementation.sample(
            logits, maxima, temperature, top_k, top_p, min_p, uniform, max_top_k=max_top_k
        )
    if max_top_k == 0:
        return logits.argmax(dim=-1)
    return draw(logits, temperature, top_k, top_p, min_p, uniform)
