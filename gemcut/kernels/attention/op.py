"""Attention over paged KV, for prefill chunks and decode rows alike (spec 2.1, 2.7, 3)."""

from __future__ import annotations

import torch

from gemcut.kernels.backend import Backend
from gemcut.kernels.check import check, check_activation


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    spans: torch.Tensor | None,
    *,
    window: int | None,
    backend: Backend,
) -> torch.Tensor:
    """softmax(q k^T) v with scale 1.0 over the keys that each query may see.

    q: [T, Hq, D], the queries of R rows one after another. k_pages, v_pages: [pages, page_size, Hk, D].
    page_table: [R, P] int32, physical page of positions [i * page_size, (i + 1) * page_size); entries
    below a row's window may hold anything and are not read. query_start: [R + 1] int32, row r owns
    queries [query_start[r], query_start[r + 1]). seq_lens: [R] int32, keys of row r, the new ones
    included: the last query of a row has position seq_lens[r] - 1; 0 marks an empty row.
    spans: [T, 2] int32, positions [begin, end) of the query's vision block, begin = end outside one.
    A query at position p sees key k if (k <= p or begin <= k < end) and k > p - window.
    Returns [T, Hq, D]; queries of no row are zero.
    """
    check_activation("paged_attention", "q", q, 3)
    count, q_heads, head = q.shape
    rows = seq_lens.shape[0]
    check("paged_attention", "k_pages", k_pages, (None, None, None, head), q.dtype, q.device)
    check("paged_attention", "v_pages", v_pages, k_pages.shape, q.dtype, q.device)
    check("paged_attention", "page_table", page_table, (rows, None), torch.int32, q.device)
    check("paged_attention", "query_start", query_start, (rows + 1,), torch.int32, q.device)
    check("paged_attention", "seq_lens", seq_lens, (rows,), torch.int32, q.device)
    if spans is not None:
        check("paged_attention", "spans", spans, (count, 2), torch.int32, q.device)
    if q_heads % k_pages.shape[2]:
        raise ValueError(f"paged_attention: {q_heads} query heads cannot share {k_pages.shape[2]} KV heads")
    out = torch.zeros_like(q)
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for row in range(rows):
        start, stop, length = starts[row], starts[row + 1], lengths[row]
        if start < stop:
            block = None if spans is None else spans[start:stop]
            out[start:stop] = _attend(q[start:stop], k_pages, v_pages, page_table[row], length, block, window)
    return out


def _attend(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    pages: torch.Tensor,
    length: int,
    spans: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """One row: q [C, Hq, D] at positions length - C .. length - 1. fp32 inside, one rounding."""
    count, q_heads, head = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    first = 0 if window is None else max(0, length - count - window + 1)
    first_page = first // page_size
    used = pages[first_page : -(-length // page_size)]
    base = first_page * page_size
    keys = k_pages[used].flatten(0, 1)[first - base : length - base].float()  # [n, Hk, D]
    values = v_pages[used].flatten(0, 1)[first - base : length - base].float()
    # queries of one KV head side by side: [Hk, C * G, D]
    grouped = q.float().view(count, kv_heads, -1, head).transpose(0, 1).flatten(1, 2)
    scores = grouped @ keys.permute(1, 2, 0)  # [Hk, C * G, n]; scale is exactly 1.0 (spec 2.1)
    if count > 1:
        p = torch.arange(length - count, length, device=q.device)[:, None]
        k = torch.arange(first, length, device=q.device)[None]
        seen = k <= p
        if spans is not None:
            seen = seen | ((k >= spans[:, :1]) & (k < spans[:, 1:]))
        if window is not None:
            seen = seen & (k > p - window)
        hidden = ~seen.repeat_interleave(q_heads // kv_heads, dim=0)
        scores = scores.masked_fill(hidden, float("-inf"))
    out = scores.softmax(dim=-1) @ values.transpose(0, 1)  # [Hk, C * G, D]
    return out.view(kv_heads, count, -1, head).transpose(0, 1).reshape(q.shape).to(q.dtype)
