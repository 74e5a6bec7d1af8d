"""Segments S1, P1 and P2 on the GPU, one launch each."""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from gemcut.kernels.add_norm.triton import fuses, load_row, rms, rounded, row_shape
from gemcut.kernels.backend import Backend
from gemcut.kernels.glu.triton import gelu_tanh
from gemcut.kernels.overlap import after_previous, overlap

VALUES = 2048  # of a program: 4 warps of 16 values a thread


@triton.jit
def _per_layer_inputs(
    projected_ptr, ids_ptr, weight_ptr, soft_rows_ptr, norm_ptr, out_ptr, count,
    scale, root, half_root, pad_id, eps,
    L: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, LAYERS: tl.constexpr, SOFT: tl.constexpr,
    ROUND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """LAYERS layers of one token."""
    token = tl.program_id(0).to(tl.int64)
    layers = (tl.program_id(1) * LAYERS + tl.arange(0, LAYERS))[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (layers < L) & (columns < W)
    dtype = out_ptr.dtype.element_ty
    norm = load_row(norm_ptr, columns, columns < W)
    after_previous(OVERLAP)
    row = tl.load(ids_ptr + token).to(tl.int64)
    if SOFT:
        row = tl.where(tl.load(soft_rows_ptr + token) >= 0, pad_id, row)
    inside = layers * W + columns
    embedded = load_row(weight_ptr + row * (L * W), inside, mask)
    x = load_row(projected_ptr + token * (L * W), inside, mask)
    x = rounded(x * scale, dtype, ROUND)
    x = rounded(x * tl.rsqrt(tl.sum(x * x, 1) / W + eps)[:, None] * norm, dtype, ROUND)
    x = rounded(x + rounded(embedded * root, dtype, ROUND), dtype, ROUND) * half_root
    tl.store(out_ptr + (layers.to(tl.int64) * count + token) * W + columns, x.to(dtype), mask)


@triton.jit
def _add_normed(
    x_ptr, d_ptr, post_ptr, out_ptr, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * H
    columns = tl.arange(0, BLOCK)
    mask = columns < H
    dtype = out_ptr.dtype.element_ty
    post = load_row(post_ptr, columns, mask)
    after_previous(OVERLAP)
    d = load_row(d_ptr + start, columns, mask)
    x = load_row(x_ptr + start, columns, mask)
    x += rounded(d * rms(d, eps, H) * post, dtype, ROUND)
    tl.store(out_ptr + start + columns, x.to(dtype), mask)


@triton.jit(do_not_specialize=["count"])
def _gate_per_layer(
    gate_ptr, inputs_ptr, out_ptr, count,
    W: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    after_previous(OVERLAP)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count.to(tl.int64) * W  # a product: the compiler knows what divides it
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + index, mask, other=0.0).to(tl.float32)
    inputs = tl.load(inputs_ptr + index, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + index, (rounded(gelu_tanh(gate), dtype, ROUND) * inputs).to(dtype), mask)


@cache
def _root(width: int, dtype: torch.dtype) -> float:
    """sqrt(W) as the weight's dtype holds it."""
    return torch.tensor(width**0.5, dtype=dtype).item()


def per_layer_inputs(
    projected: torch.Tensor,
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    soft_rows: torch.Tensor | None,
    norm_weight: torch.Tensor,
    *,
    hidden: int,
    pad_id: int,
    eps: float,
    backend: Backend,
) -> torch.Tensor:
    count, width = projected.shape[0], norm_weight.shape[0]
    num_layers = projected.shape[1] // width
    block = triton.next_power_of_2(width)
    layers = max(1, VALUES // block)
    out = projected.new_empty(num_layers, count, width)
    _per_layer_inputs[(count, triton.cdiv(num_layers, layers))](
        projected, token_ids, weight, soft_rows, norm_weight, out, count,
        hidden**-0.5, _root(width, weight.dtype), 2**-0.5, pad_id, eps,
        num_layers, width, block, layers, soft_rows is not None, backend.numerics == "reference",
        num_warps=4, enable_fp_fusion=fuses(backend), **overlap(weight.device),
    )  # fmt: skip
    return out


def add_normed(
    x: torch.Tensor, d: torch.Tensor, post_weight: torch.Tensor, *, eps: float, backend: Backend
) -> torch.Tensor:
    count, hidden = x.shape
    block, warps = row_shape(hidden)
    out = torch.empty_like(x)
    _add_normed[(count,)](
        x, d, post_weight, out, eps,
        hidden, block, backend.numerics == "reference", num_warps=warps, **overlap(x.device),
    )  # fmt: skip
    return out


def gate_per_layer(gate: torch.Tensor, inputs: torch.Tensor, *, backend: Backend) -> torch.Tensor:
    count, width = gate.shape
    out = torch.empty_like(gate)
    _gate_per_layer[(triton.cdiv(count * width, VALUES // 2),)](
        gate, inputs, out, count, width, VALUES // 2, backend.numerics == "reference",
        num_warps=4, **overlap(gate.device),
    )  # fmt: skip
    return out
