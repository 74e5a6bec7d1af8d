"""Choosing tokens on the GPU, without a sort of the vocabulary.

The maxima of blocks say where the largest logits are. Greedy: the first block with the largest maximum.
Top-k: the k largest logits lie in the k blocks with the largest maxima, so one program reads at most k blocks
of a row, up to `FEW`. What may keep more is in `many`.
"""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemcut.kernels.logits.op import BLOCK
from gemcut.kernels.overlap import after_previous, overlap
from gemcut.kernels.sample import many
from gemcut.kernels.sample.keys import (
    LEAST,
    divisor,
    edge_of,
    enough,
    mass_of,
    ordered,
    point_of,
    scaled_logits,
    value_of,
)

FEW = 64  # the largest top_k that one program draws with


@triton.jit
def _greedy(
    logits_ptr, maxima_ptr, tokens_ptr,
    V: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    after_previous(OVERLAP)
    ALL: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, WIDTH)
    maxima = tl.load(maxima_ptr + row * ALL + block, block < ALL, other=float("-inf"))
    _, first = tl.max(scaled_logits(maxima, 1.0), 0, return_indices=True, return_indices_tie_break_left=True)
    index = first * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * V + index, index < V, other=float("-inf"))
    _, place = tl.max(scaled_logits(logits, 1.0), 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(tokens_ptr + row, (first * BLOCK + place).to(tl.int64))


@triton.jit
def _first_of_largest(keys, real, k, low, high):
    """(1 where one of the k largest keys is, else 0; an edge that they reach). Of equal keys the first."""
    edge, reached = edge_of(keys, real.to(tl.int32), k, 0, low, high)
    tied = (real & (keys == edge)).to(tl.int32)
    left = tl.sum(tied, 0) - tl.maximum(reached - k, 0)
    kept = real & (keys >= edge) & ((tied == 0) | (tl.cumsum(tied, 0) <= left))
    return kept.to(tl.int32), edge


@triton.jit
def _draw_few(
    logits_ptr, maxima_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr,
    blocks_ptr, keys_ptr, tokens_ptr,
    V: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, FEW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A row with at most FEW tokens to choose from. blocks, keys: [R, FEW], what threads tell each other."""
    after_previous(OVERLAP)
    ALL: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, FEW)
    by, top_k = divisor(temperature_ptr + row, top_k_ptr + row)
    k = tl.minimum(top_k, FEW).to(tl.int32)

    # the k blocks with the largest maxima
    block = tl.arange(0, WIDTH)
    maxima = tl.load(maxima_ptr + row * ALL + block, block < ALL, other=float("-inf"))
    best = ordered(scaled_logits(maxima, by))
    high = tl.max(best, 0)
    bottom = ordered(tl.full([], float("-inf"), tl.float32))
    blocks = tl.minimum(k, ALL)
    least = tl.min(tl.where(block < ALL, best, high), 0)
    kept, edge = _first_of_largest(best, block < ALL, blocks, least, high)
    tl.store(blocks_ptr + row * FEW + tl.cumsum(kept, 0) - 1, block, kept > 0)
    tl.debug_barrier()
    chosen = tl.load(blocks_ptr + row * FEW + slot, slot < blocks, other=ALL)

    # the k largest of their logits, in the order of ids
    ids = chosen[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    logits = tl.load(logits_ptr + row * V + ids, ids < V, other=float("-inf"))
    keys = tl.where(ids < V, ordered(scaled_logits(logits, by)), LEAST)
    keys, ids = tl.reshape(keys, [FEW * BLOCK]), tl.reshape(ids, [FEW * BLOCK])
    low = tl.where(k <= ALL, edge, bottom)
    kept, edge = _first_of_largest(keys, keys > LEAST, k, low, high)
    packed = (keys.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)  # larger logit first, then lower id
    tl.store(keys_ptr + row * FEW + tl.cumsum(kept, 0) - 1, packed, kept > 0)
    tl.debug_barrier()
    real = slot < tl.minimum(k, V)
    packed = tl.load(keys_ptr + row * FEW + slot, real, other=-0x8000000000000000)

    # top-p, min-p and the draw
    value = tl.where(real, value_of((packed >> 32).to(tl.int32)), float("-inf"))
    weight, mass = mass_of(value, tl.max(value, 0))
    before = tl.sum(tl.where(packed[None, :] > packed[:, None], mass[None, :], 0), 1)
    within = before < enough(tl.sum(mass, 0), tl.load(top_p_ptr + row))
    mass = tl.where(within & (weight >= tl.load(min_p_ptr + row)), mass, 0)
    point = point_of(tl.load(uniform_ptr + row), tl.sum(mass, 0))
    drawn = tl.sum((tl.cumsum(mass, 0) <= point).to(tl.int32), 0)
    token = 0x7FFFFFFF - (packed & 0x7FFFFFFF)
    tl.store(tokens_ptr + row, tl.sum(tl.where(slot == drawn, token, 0), 0))


def sample(
    logits: torch.Tensor,
    maxima: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    *,
    max_top_k: int | None,
) -> torch.Tensor:
    rows, vocab = logits.shape
    width = triton.next_power_of_2(maxima.shape[1])
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    early = overlap(logits.device)
    if max_top_k == 0:
        _greedy[(rows,)](logits, maxima, tokens, vocab, BLOCK, width, num_warps=8, **early)
    elif max_top_k is not None and max_top_k <= FEW:
        blocks = torch.empty(rows, FEW, dtype=torch.int32, device=logits.device)
        keys = torch.empty(rows, FEW, dtype=torch.int64, device=logits.device)
        _draw_few[(rows,)](
            logits, maxima, temperature, top_k, top_p, min_p, uniform, blocks, keys, tokens,
            vocab, BLOCK, width, FEW, num_warps=8, **early,
        )  # fmt: skip
    else:
        many.draw(logits, maxima, temperature, top_k, top_p, min_p, uniform, tokens)
    return tokens
