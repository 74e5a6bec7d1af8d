"""Attention over paged KV, for prefill chunks and decode rows alike (spec 2.1, 2.7, 3)."""

from __future__ import annotations

import torch

from gemcut.kernels.attention.reference import attend
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
    check("paged_attention", "seq_lens", seq_lens, (None,), torch.int32, q.device)
    rows = seq_lens.shape[0]
    check("paged_attention", "k_pages", k_pages, (None, None, None, head), q.dtype, q.device)
    check("paged_attention", "v_pages", v_pages, k_pages.shape, q.dtype, q.device)
    check("paged_attention", "page_table", page_table, (rows, None), torch.int32, q.device)
    check("paged_attention", "query_start", query_start, (rows + 1,), torch.int32, q.device)
    if spans is not None:
        check("paged_attention", "spans", spans, (count, 2), torch.int32, q.device)
    if q_heads % k_pages.shape[2]:
        raise ValueError(f"paged_attention: {q_heads} query heads cannot share {k_pages.shape[2]} KV heads")
    if backend.kernels == "triton":
        from gemcut.kernels.attention import triton as implementation

        return implementation.paged_attention(
            q,
            k_pages,
            v_pages,
            page_table,
            query_start,
            seq_lens,
            spans,
            window=window,
            backend=backend,
        )
    return attend(
        q,
        k_pages,
        v_pages,
        page_table,
        query_start,
        seq_lens,
        spans,
        window,
        backend.deterministic,
    )
