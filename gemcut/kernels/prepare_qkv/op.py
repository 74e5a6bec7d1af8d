"""Segments B and B': from the QKV product to attention (spec 2.2 B1, B2; 2.3; 2.7)."""

from __future__ import annotations

import torch

from gemcut.kernels.add_norm.op import rms_norm
from gemcut.kernels.backend import Backend
from gemcut.kernels.check import check, check_activation
from gemcut.kernels.rope.op import rotate


def prepare_qkv(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    rope: torch.Tensor,
    slots: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    *,
    q_heads: int,
    eps: float,
    backend: Backend,
) -> torch.Tensor:
    """Norm q, k and v per head, turn q and k, write k and v to their pages; return q.

    qkv: [T, (Hq + n Hk) D], n = 2, or 1 if V comes from the raw K product (k_eq_v, spec 2.2).
    q_norm, k_norm: [D]. rope: [2, T, A]. slots: [T] int64, page * page_size + offset, or -1 for
    padding rows, which are not written. k_pages, v_pages: [pages, page_size, Hk, D], written in place.
    Returns q [T, Hq, D].
    """
    check_activation("prepare_qkv", "qkv", qkv, 2)
    count, head = qkv.shape[0], q_norm.shape[-1]
    pages = k_pages.shape[0]
    check("prepare_qkv", "q_norm", q_norm, (head,), qkv.dtype, qkv.device)
    check("prepare_qkv", "k_norm", k_norm, (head,), qkv.dtype, qkv.device)
    check("prepare_qkv", "rope", rope, (2, count, None), qkv.dtype, qkv.device)
    check("prepare_qkv", "slots", slots, (count,), torch.int64, qkv.device)
    check("prepare_qkv", "k_pages", k_pages, (pages, None, None, head), qkv.dtype, qkv.device)
    check("prepare_qkv", "v_pages", v_pages, k_pages.shape, qkv.dtype, qkv.device)
    kv_heads = k_pages.shape[2]
    q_width, kv_width = q_heads * head, kv_heads * head
    if qkv.shape[1] not in (q_width + kv_width, q_width + 2 * kv_width):
        raise ValueError(
            f"prepare_qkv: qkv must have {q_width + kv_width} columns (k_eq_v) or {q_width + 2 * kv_width}, "
            f"got {qkv.shape[1]}"
        )
    if backend.kernels == "triton":
        from gemcut.kernels.prepare_qkv import triton as implementation

        return implementation.prepare_qkv(
            qkv, q_norm, k_norm, rope, slots, k_pages, v_pages, q_heads=q_heads, eps=eps, backend=backend
        )
    # every head is divided by its own root mean square, q and k get their weights; then one rounding
    normed = rms_norm(qkv.float().view(count, -1, head), None, eps)
    v = normed[:, -kv_heads:].to(qkv.dtype)  # with k_eq_v the raw K product once more
    weights = torch.cat([q_norm.expand(q_heads, -1), k_norm.expand(kv_heads, -1)])
    turned = rotate((normed[:, : q_heads + kv_heads] * weights.float()).to(qkv.dtype), rope)
    q, k = turned.split([q_heads, kv_heads], dim=1)
    kept = (slots >= 0).nonzero().flatten()
    where = slots[kept]
    for pages, rows in ((k_pages, k), (v_pages, v)):
        pages.view(-1, kv_heads, head).index_copy_(0, where, rows.index_select(0, kept))
    return q.contiguous()


def prepare_q(
    q: torch.Tensor, q_norm: torch.Tensor, rope: torch.Tensor, *, eps: float, backend: Backend
) -> torch.Tensor:
    """Norm q per head and turn it: all that a layer does which reads another layer's K and V (spec 2.3).

    q: [T, Hq D]. q_norm: [D]. rope: [2, T, A]. Returns [T, Hq, D].
    """
    check_activation("prepare_q", "q", q, 2)
    count, head = q.shape[0], q_norm.shape[-1]
    check("prepare_q", "q_norm", q_norm, (head,), q.dtype, q.device)
    check("prepare_q", "rope", rope, (2, count, None), q.dtype, q.device)
    if head == 0 or q.shape[1] % head:
        raise ValueError(f"prepare_q: q must have a multiple of {head} columns, got {q.shape[1]}")
    if backend.kernels == "triton":
        from gemcut.kernels.prepare_qkv import triton as implementation

        return implementation.prepare_q(q, q_norm, rope, eps=eps, backend=backend)
    return rotate(rms_norm(q.view(count, -1, head), q_norm, eps), rope)
