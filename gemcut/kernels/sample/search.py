"""Sampling from as many tokens as a row likes, in a fixed number of passes over its logits.

Which tokens stay is said by an edge: all logits above it, and the first few that are equal to it. The edge of
top-k is where k logits are reached, that of top-p where enough mass is. Both are searched alike: a pass sums
what reaches each of 15 places in the interval that is left, and 8 passes leave one of 2^32 values. Later
passes read only blocks whose maxima reach into the interval. Sums are whole numbers: no order changes them.
"""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemcut.kernels.logits.op import BLOCK
from gemcut.kernels.overlap import after_previous, overlap
from gemcut.kernels.sample.keys import (
    divisor,
    enough,
    kth_largest,
    mass_of,
    ordered,
    point_of,
    scaled_logits,
    value_of,
)

WAYS = 16
PASSES = 8  # 16^8 = 2^32
CHUNK = 32  # blocks of a program


@triton.jit
def _load_chunk(
    logits_ptr, maxima_ptr, chunk, by, least, V: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """(keys, scaled logits) of a chunk of a row, flat; blocks without a key from `least` on are not read."""
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    block = chunk * CHUNK + tl.arange(0, CHUNK)
    maxima = tl.load(maxima_ptr + block, block < BLOCKS, other=float("-inf"))
    wanted = (ordered(scaled_logits(maxima, by)) >= least) & (block < BLOCKS)
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = wanted[:, None] & (index < V)
    value = scaled_logits(tl.load(logits_ptr + index, inside, other=float("-inf")), by)
    keys = tl.where(inside, ordered(value), -0x80000000)  # below -inf
    return tl.reshape(keys, [CHUNK * BLOCK]), tl.reshape(value, [CHUNK * BLOCK])


@triton.jit
def _narrowed(lo, hi, above, target, sums_ptr, WAYS: tl.constexpr):
    """The interval [lo, hi] of the edge after a pass, and what is above it.

    The edge is the largest key that is reached by `target`, as `lo` is. If a place is reached by just that
    much, the edge is put right below it, and nothing that is equal to it is needed.
    """
    step = (hi - lo + WAYS) // WAYS
    way = tl.arange(0, WAYS)
    sums = tl.load(sums_ptr + way)
    reached = (way > 0) & (lo + way * step <= hi) & (sums >= target)
    best = tl.max(tl.where(reached, way, 0), 0)
    low = lo + best * step
    high = tl.minimum(hi, low + step - 1)
    above = tl.where(high < hi, tl.sum(tl.where(way == best + 1, sums, 0), 0), above)
    exact = (best > 0) & (tl.sum(tl.where(way == best, sums, 0), 0) == target)
    return (
        tl.where(exact, low - 1, low),
        tl.where(exact, low - 1, high),
        tl.where(exact, target, above),
    )


@triton.jit
def _begin(
    maxima_ptr, temperature_ptr, top_k_ptr, state_ptr, largest_ptr,
    V: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Where a row's edge of top-k may be: not below the k-th largest maximum of blocks."""
    after_previous(OVERLAP)
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64)
    by, k = divisor(temperature_ptr + row, top_k_ptr + row)
    block = tl.arange(0, WIDTH)
    maxima = tl.load(maxima_ptr + row * BLOCKS + block, block < BLOCKS, other=float("-inf"))
    value = scaled_logits(maxima, by)
    largest = tl.max(value, 0)
    bottom = ordered(tl.full([], float("-inf"), tl.float32))
    edge = kth_largest(ordered(value), tl.minimum(k, BLOCKS).to(tl.int32))[0]
    lo = tl.where(k <= BLOCKS, edge, bottom)
    hi = tl.where(k < V, ordered(largest), bottom)  # who keeps all has nothing to search
    tl.store(largest_ptr + row, largest)
    tl.store(state_ptr + row * 4, tl.where(k < V, lo, bottom).to(tl.int64))
    tl.store(state_ptr + row * 4 + 1, hi.to(tl.int64))
    tl.store(state_ptr + row * 4 + 2, tl.zeros([], tl.int64))
    tl.store(state_ptr + row * 4 + 3, k)


@triton.jit
def _settled(state_ptr, sums_ptr, largest, top_p, number, BY_MASS: tl.constexpr, WAYS: tl.constexpr):
    """(lo, hi, above, target) before pass `number` of a search. The search by mass begins with the end of the
    one by count, and knows its target after its first pass; until then the target is how many keys that are
    equal to the edge of top-k stay."""
    lo, hi = tl.load(state_ptr), tl.load(state_ptr + 1)
    above, target = tl.load(state_ptr + 2), tl.load(state_ptr + 3)
    if BY_MASS and number == 1 and top_p < 1:
        tied = mass_of(value_of(lo.to(tl.int32)), largest)[1]
        target = enough(tl.load(sums_ptr) + target * tied, top_p)
    if BY_MASS or number > 0:
        lo, hi, above = _narrowed(lo, hi, above, target, sums_ptr, WAYS)
    if BY_MASS and number == 0:
        target -= above
        above = tl.zeros([], tl.int64)
        hi = tl.where(top_p < 1, ordered(largest).to(tl.int64), lo)
    return lo, hi, above, target


@triton.jit(do_not_specialize=["number"])
def _narrow(
    logits_ptr, maxima_ptr, temperature_ptr, top_k_ptr, top_p_ptr, largest_ptr,
    state_ptr, next_state_ptr, sums_ptr, next_sums_ptr, number,
    V: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, WAYS: tl.constexpr, BY_MASS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """A pass: what reaches each of WAYS places, the first of which is right above the interval's end."""
    after_previous(OVERLAP)
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    largest = tl.load(largest_ptr + row)
    lo, hi, above, target = _settled(
        state_ptr + row * 4, sums_ptr + row * WAYS, largest, tl.load(top_p_ptr + row), number, BY_MASS, WAYS
    )
    if chunk == 0:
        tl.store(next_state_ptr + row * 4, lo)
        tl.store(next_state_ptr + row * 4 + 1, hi)
        tl.store(next_state_ptr + row * 4 + 2, above)
        tl.store(next_state_ptr + row * 4 + 3, target)
    if lo < hi:
        by = divisor(temperature_ptr + row, top_k_ptr + row)[0]
        keys, value = _load_chunk(
            logits_ptr + row * V, maxima_ptr + row * BLOCKS, chunk, by, (lo + 1).to(tl.int32), V, BLOCK, CHUNK
        )
        way = tl.arange(0, WAYS)
        step = (hi - lo + WAYS) // WAYS
        places = tl.where(way == 0, lo + 1, lo + way * step).to(tl.int32)
        reaching = keys[None, :] >= places[:, None]
        if BY_MASS:
            mass = mass_of(value, largest)[1]
            sums = tl.sum(tl.where(reaching, mass[None, :], 0), 1)
        else:
            sums = tl.sum(reaching.to(tl.int32), 1).to(tl.int64)
        tl.atomic_add(next_sums_ptr + row * WAYS + way, sums, sem="relaxed")


@triton.jit
def _weigh(
    logits_ptr, maxima_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, largest_ptr,
    state_ptr, next_state_ptr, sums_ptr, masses_ptr, ties_ptr, number, chunks,
    V: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, WAYS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The edge, how many keys equal to it stay, and of a chunk the mass above it and the keys equal to it."""
    after_previous(OVERLAP)
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    largest, top_p = tl.load(largest_ptr + row), tl.load(top_p_ptr + row)
    edge, _, above, target = _settled(
        state_ptr + row * 4, sums_ptr + row * WAYS, largest, top_p, number, True, WAYS
    )
    if chunk == 0:
        tied = tl.maximum(mass_of(value_of(edge.to(tl.int32)), largest)[1], 1)
        tl.store(next_state_ptr + row * 4, edge)
        tl.store(
            next_state_ptr + row * 4 + 1, tl.where(top_p < 1, (target - above + tied - 1) // tied, target)
        )
    by = divisor(temperature_ptr + row, top_k_ptr + row)[0]
    edge = edge.to(tl.int32)
    keys, value = _load_chunk(
        logits_ptr + row * V, maxima_ptr + row * BLOCKS, chunk, by, edge, V, BLOCK, CHUNK
    )
    weight, mass = mass_of(value, largest)
    kept = (keys > edge) & (weight >= tl.load(min_p_ptr + row))
    tl.store(masses_ptr + row * chunks + chunk, tl.sum(tl.where(kept, mass, 0), 0))
    tl.store(ties_ptr + row * chunks + chunk, tl.sum((keys == edge).to(tl.int64), 0))


@triton.jit
def _pick(
    logits_ptr, maxima_ptr, temperature_ptr, top_k_ptr, min_p_ptr, uniform_ptr, largest_ptr,
    state_ptr, masses_ptr, ties_ptr, tokens_ptr, chunks,
    V: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The draw: first the chunk, then the token in it."""
    after_previous(OVERLAP)
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64)
    largest, min_p = tl.load(largest_ptr + row), tl.load(min_p_ptr + row)
    edge, left = tl.load(state_ptr + row * 4).to(tl.int32), tl.load(state_ptr + row * 4 + 1)
    weight, tied = mass_of(value_of(edge), largest)
    tied = tl.where(weight >= min_p, tied, 0)
    chunk = tl.arange(0, WIDTH)
    ties = tl.load(ties_ptr + row * chunks + chunk, chunk < chunks, other=0)
    earlier = tl.cumsum(ties, 0) - ties
    kept = tl.minimum(tl.maximum(left - earlier, 0), ties)
    masses = tl.load(masses_ptr + row * chunks + chunk, chunk < chunks, other=0) + kept * tied
    point = point_of(tl.load(uniform_ptr + row), tl.sum(masses, 0))
    drawn = tl.sum((tl.cumsum(masses, 0) <= point).to(tl.int32), 0)
    point -= tl.sum(tl.where(chunk < drawn, masses, 0), 0)
    left -= tl.sum(tl.where(chunk < drawn, ties, 0), 0)

    by = divisor(temperature_ptr + row, top_k_ptr + row)[0]
    keys, value = _load_chunk(
        logits_ptr + row * V, maxima_ptr + row * BLOCKS, drawn, by, edge, V, BLOCK, CHUNK
    )
    weight, mass = mass_of(value, largest)
    equal = keys == edge
    stays = (keys > edge) | (equal & (tl.cumsum(equal.to(tl.int64), 0) <= left))
    mass = tl.where(stays & (weight >= min_p), mass, 0)
    place = tl.sum((tl.cumsum(mass, 0) <= point).to(tl.int32), 0)
    tl.store(tokens_ptr + row, (drawn * (CHUNK * BLOCK) + place).to(tl.int64))


def draw(
    logits: torch.Tensor,
    maxima: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """Arguments as in `sample`; writes `tokens`: [R] int64."""
    rows, vocab = logits.shape
    width = triton.next_power_of_2(maxima.shape[1])
    chunks = triton.cdiv(maxima.shape[1], CHUNK)
    early = overlap(logits.device)
    state = torch.empty(2 * PASSES + 2, rows, 4, dtype=torch.int64, device=logits.device)
    sums = torch.zeros(2 * PASSES, rows, WAYS, dtype=torch.int64, device=logits.device)
    largest = torch.empty(rows, dtype=torch.float32, device=logits.device)
    masses, ties = torch.empty(2, rows, chunks, dtype=torch.int64, device=logits.device)
    _begin[(rows,)](
        maxima, temperature, top_k, state, largest, vocab, BLOCK, width, num_warps=4, **early
    )  # fmt: skip
    for number in range(2 * PASSES):
        _narrow[(rows, chunks)](
            logits, maxima, temperature, top_k, top_p, largest,
            state[number], state[number + 1], sums[max(number - 1, 0)], sums[number], number % PASSES,
            vocab, BLOCK, CHUNK, WAYS, number >= PASSES, num_warps=8, **early,
        )  # fmt: skip
    _weigh[(rows, chunks)](
        logits, maxima, temperature, top_k, top_p, min_p, largest,
        state[-2], state[-1], sums[-1], masses, ties, PASSES, chunks,
        vocab, BLOCK, CHUNK, WAYS, num_warps=8, **early,
    )  # fmt: skip
    _pick[(rows,)](
        logits, maxima, temperature, top_k, min_p, uniform, largest, state[-1], masses, ties, tokens, chunks,
        vocab, BLOCK, CHUNK, triton.next_power_of_2(chunks), num_warps=8, **early,
    )  # fmt: skip
