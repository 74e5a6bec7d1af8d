"""Sampling from many tokens of a row, or from all, with no sort and no wait for the device.

`_bound` finds what at least k maxima of blocks reach, so that the k largest logits do, and `_list` lists all
logits that do, a few more than k; `_draw_listed` cuts the list down to top-k and top-p and draws. Where k has
no bound the largest `MOST` are listed all the same: what top-p keeps is mostly among them.

Rows with more to keep, or with crowds of equal logits, are searched by `_narrow`. What stays is said by an
edge: all keys above it, and the first few that are equal to it. The edge of top-k is where k keys are reached
and that of top-p where enough mass is. A pass sums what reaches each of 15 places in the interval that is
left, and 8 passes leave one of 2^32 keys. Sums are whole numbers: no order changes them.
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
    LEAST,
    divisor,
    edge_of,
    enough,
    load_blocks,
    mass_of,
    ordered,
    point_of,
    scaled_logits,
    value_of,
)

MOST, PLACES = 1024, 4096  # the largest top_k that is listed for, and room of a row's list
LIST_BLOCKS = 16  # of a program that lists
WAYS = 16
PASSES = 8  # 16^8 = 2^32
BLOCKS = 32  # of a program that searches


@triton.jit
def _bound(
    maxima_ptr, temperature_ptr, top_k_ptr, largest_ptr, bound_ptr, listed_ptr,
    V: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, MOST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A key that at least k logits of the row reach, k up to MOST, and not many more; the largest logit."""
    after_previous(OVERLAP)
    ALL: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64)
    by, k = divisor(temperature_ptr + row, top_k_ptr + row)
    k = tl.minimum(k, MOST).to(tl.int32)
    block = tl.arange(0, WIDTH)
    maxima = tl.load(maxima_ptr + row * ALL + block, block < ALL, other=float("-inf"))
    value = scaled_logits(maxima, by)
    largest = tl.max(value, 0)
    bottom = ordered(tl.full([], float("-inf"), tl.float32))
    keys = ordered(value)
    real = (block < ALL).to(tl.int32)
    least = tl.min(tl.where(block < ALL, keys, ordered(largest)), 0)
    bound = edge_of(keys, real, tl.minimum(k, ALL), k // 4, least, ordered(largest))[0]
    # what is less likely than 2^-40 has no mass and need not be there; nor need a row with nothing but -inf
    bound = tl.maximum(tl.where(k <= ALL, bound, bottom), ordered(largest - 28.0))
    tl.store(bound_ptr + row, tl.where(largest > float("-inf"), bound, 0x7FFFFFFF))
    tl.store(largest_ptr + row, largest)
    tl.store(listed_ptr + row, tl.zeros([], tl.int32))


@triton.jit
def _list(
    logits_ptr, maxima_ptr, temperature_ptr, top_k_ptr, top_p_ptr, largest_ptr, bound_ptr,
    listed_ptr, list_ptr, masses_ptr, steps,
    V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, MOST: tl.constexpr, PLACES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Append what reaches the bound, in any order. Of rows that need it, the mass of all."""
    after_previous(OVERLAP)
    ALL: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row, step = tl.program_id(0).to(tl.int64), tl.program_id(1)
    by, k = divisor(temperature_ptr + row, top_k_ptr + row)
    bound = tl.load(bound_ptr + row)
    weighs = (k > MOST) & (tl.load(top_p_ptr + row) < 1)
    keys, value, ids = load_blocks(
        logits_ptr + row * V, maxima_ptr + row * ALL, step * BLOCKS, by, tl.where(weighs, LEAST, bound),
        V, BLOCK, BLOCKS,
    )  # fmt: skip
    reaching = (keys >= bound).to(tl.int32)
    count = tl.sum(reaching, 0)
    if count > 0:
        first = tl.atomic_add(listed_ptr + row, count, sem="relaxed")
        place = first + tl.cumsum(reaching, 0) - 1
        packed = (keys.to(tl.int64) << 32) | ids.to(tl.int64)
        tl.store(list_ptr + row * PLACES + place, packed, (reaching > 0) & (place < PLACES))
    if weighs:
        tl.store(masses_ptr + row * steps + step, tl.sum(mass_of(value, tl.load(largest_ptr + row))[1], 0))


@triton.jit
def _without_last(kept, tied, ids, count):
    """Without the `count` highest ids among those that are tied."""
    if count > 0:
        zero = tl.zeros([], tl.int32)
        cut = edge_of(tl.where(tied, ids, -1), tied.to(tl.int32), count, 0, zero, tl.max(ids, 0))[0]
        kept = kept & ~(tied & (ids >= cut))
    return kept


@triton.jit
def _store_state(state_ptr, lo, hi, above, target):
    """A search: its edge lies in [lo, hi], `above` is what is above that, `target` is to be reached."""
    tl.store(state_ptr, lo)
    tl.store(state_ptr + 1, hi)
    tl.store(state_ptr + 2, above)
    tl.store(state_ptr + 3, target)


@triton.jit
def _draw_listed(
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, largest_ptr, bound_ptr,
    listed_ptr, list_ptr, masses_ptr, tokens_ptr, left_ptr, state_ptr, steps,
    V: tl.constexpr, MOST: tl.constexpr, PLACES: tl.constexpr, STEPS: tl.constexpr, ID_BITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Top-k, top-p, min-p and the draw from a row's list. Says whether the row is left to the search, and
    where that begins."""
    after_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    k = divisor(temperature_ptr + row, top_k_ptr + row)[1]
    top_p, largest = tl.load(top_p_ptr + row), tl.load(largest_ptr + row)
    low, high = tl.load(bound_ptr + row), ordered(largest)
    listed = tl.load(listed_ptr + row)
    complete = (listed <= PLACES) & ((k <= MOST) | (top_p < 1))
    place = tl.arange(0, PLACES)
    kept = place < tl.minimum(listed, PLACES)
    packed = tl.load(list_ptr + row * PLACES + place, kept, other=0)
    keys, ids = tl.where(kept, (packed >> 32).to(tl.int32), LEAST), packed.to(tl.int32)
    weight, mass = mass_of(tl.where(kept, value_of(keys), float("-inf")), largest)
    if k <= MOST:
        edge, reached = edge_of(keys, kept.to(tl.int32), k.to(tl.int32), 0, low, high)
        kept = _without_last(kept & (keys >= edge), keys == edge, ids, reached - k.to(tl.int32))
        mass = tl.where(kept, mass, 0)
        total = tl.sum(mass, 0)
    else:
        step = tl.arange(0, STEPS)
        total = tl.sum(tl.load(masses_ptr + row * steps + step, (step < steps) & complete, other=0), 0)
    if top_p < 1:
        target = enough(total, top_p)
        complete = complete & ((tl.sum(mass, 0) >= target) | (listed == 0))
        edge, reached = edge_of(keys, mass, target, 0, low, high)
        tied = tl.max(tl.where(keys == edge, mass, 0), 0)
        spare = tl.where(complete, (reached - target) // tl.maximum(tied, 1), 0).to(tl.int32)
        kept = _without_last(kept & (keys >= edge), kept & (keys == edge), ids, spare)
    mass = tl.where(kept & (weight >= tl.load(min_p_ptr + row)), mass, 0)
    point = point_of(tl.load(uniform_ptr + row), tl.sum(mass, 0))
    # the largest id with no more than `point` before it
    token = tl.zeros([], tl.int32)
    for i in tl.static_range(ID_BITS):
        trial = token | (1 << (ID_BITS - 1 - i))
        token = tl.where(tl.sum(tl.where(ids < trial, mass, 0), 0) <= point, trial, token)
    tl.store(tokens_ptr + row, tl.where(point < 0, 0, token).to(tl.int64))
    tl.store(left_ptr + row, 1 - complete.to(tl.int32))
    # the list of a row with a bound on k was too short, so more than k keys reach the bound
    bottom = ordered(tl.full([], float("-inf"), tl.float32))
    _store_state(
        state_ptr + row * 4,
        tl.where(k <= MOST, low, bottom).to(tl.int64),
        tl.where(k < V, high, bottom).to(tl.int64),  # who keeps all has nothing to search
        tl.zeros([], tl.int64),
        k,
    )


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
    left_ptr, state_ptr, next_state_ptr, sums_ptr, next_sums_ptr, number,
    V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, WAYS: tl.constexpr, BY_MASS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """A pass: what reaches each of WAYS places, the first of which is right above the interval's end."""
    after_previous(OVERLAP)
    if tl.load(left_ptr + tl.program_id(0)) == 0:
        return
    ALL: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    largest = tl.load(largest_ptr + row)
    lo, hi, above, target = _settled(
        state_ptr + row * 4, sums_ptr + row * WAYS, largest, tl.load(top_p_ptr + row), number, BY_MASS, WAYS
    )
    if chunk == 0:
        _store_state(next_state_ptr + row * 4, lo, hi, above, target)
    if lo < hi:
        by = divisor(temperature_ptr + row, top_k_ptr + row)[0]
        keys, value, _ = load_blocks(
            logits_ptr + row * V, maxima_ptr + row * ALL, chunk * BLOCKS, by, (lo + 1).to(tl.int32),
            V, BLOCK, BLOCKS,
        )  # fmt: skip
        if tl.max(keys, 0) > lo:
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
    left_ptr, state_ptr, next_state_ptr, sums_ptr, masses_ptr, ties_ptr, number, chunks,
    V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, WAYS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The edge, how many keys equal to it stay, and of a chunk the mass above it and the keys equal to it."""
    after_previous(OVERLAP)
    if tl.load(left_ptr + tl.program_id(0)) == 0:
        return
    ALL: tl.constexpr = (V + BLOCK - 1) // BLOCK
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
    keys, value, _ = load_blocks(
        logits_ptr + row * V, maxima_ptr + row * ALL, chunk * BLOCKS, by, edge, V, BLOCK, BLOCKS
    )
    weight, mass = mass_of(value, largest)
    kept = (keys > edge) & (weight >= tl.load(min_p_ptr + row))
    tl.store(masses_ptr + row * chunks + chunk, tl.sum(tl.where(kept, mass, 0), 0))
    tl.store(ties_ptr + row * chunks + chunk, tl.sum((keys == edge).to(tl.int64), 0))


@triton.jit
def _pick(
    logits_ptr, maxima_ptr, temperature_ptr, top_k_ptr, min_p_ptr, uniform_ptr, largest_ptr,
    left_ptr, state_ptr, masses_ptr, ties_ptr, tokens_ptr, chunks,
    V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The draw: first the chunk, then the token in it."""
    after_previous(OVERLAP)
    if tl.load(left_ptr + tl.program_id(0)) == 0:
        return
    ALL: tl.constexpr = (V + BLOCK - 1) // BLOCK
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
    keys, value, _ = load_blocks(
        logits_ptr + row * V, maxima_ptr + row * ALL, drawn * BLOCKS, by, edge, V, BLOCK, BLOCKS
    )
    weight, mass = mass_of(value, largest)
    equal = keys == edge
    stays = (keys > edge) | (equal & (tl.cumsum(equal.to(tl.int64), 0) <= left))
    mass = tl.where(stays & (weight >= min_p), mass, 0)
    place = tl.sum((tl.cumsum(mass, 0) <= point).to(tl.int32), 0)
    tl.store(tokens_ptr + row, (drawn * (BLOCKS * BLOCK) + place).to(tl.int64))


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
    device, early = logits.device, overlap(logits.device)
    steps, chunks = triton.cdiv(maxima.shape[1], LIST_BLOCKS), triton.cdiv(maxima.shape[1], BLOCKS)
    bound, listed, left = torch.empty(3, rows, dtype=torch.int32, device=device)
    largest = torch.empty(rows, dtype=torch.float32, device=device)
    keys = torch.empty(rows, PLACES, dtype=torch.int64, device=device)
    step_masses = torch.empty(rows, steps, dtype=torch.int64, device=device)
    state = torch.empty(2 * PASSES + 2, rows, 4, dtype=torch.int64, device=device)
    sums = torch.zeros(2 * PASSES, rows, WAYS, dtype=torch.int64, device=device)
    masses, ties = torch.empty(2, rows, chunks, dtype=torch.int64, device=device)
    _bound[(rows,)](
        maxima, temperature, top_k, largest, bound, listed,
        vocab, BLOCK, triton.next_power_of_2(maxima.shape[1]), MOST, num_warps=4, **early,
    )  # fmt: skip
    _list[(rows, steps)](
        logits, maxima, temperature, top_k, top_p, largest, bound, listed, keys, step_masses, steps,
        vocab, BLOCK, LIST_BLOCKS, MOST, PLACES, num_warps=4, **early,
    )  # fmt: skip
    _draw_listed[(rows,)](
        temperature, top_k, top_p, min_p, uniform, largest, bound,
        listed, keys, step_masses, tokens, left, state, steps,
        vocab, MOST, PLACES, triton.next_power_of_2(steps), (vocab - 1).bit_length(), num_warps=16, **early,
    )  # fmt: skip
    for number in range(2 * PASSES):
        _narrow[(rows, chunks)](
            logits, maxima, temperature, top_k, top_p, largest, left,
            state[number], state[number + 1], sums[max(number - 1, 0)], sums[number], number % PASSES,
            vocab, BLOCK, BLOCKS, WAYS, number >= PASSES, num_warps=8, **early,
        )  # fmt: skip
    _weigh[(rows, chunks)](
        logits, maxima, temperature, top_k, top_p, min_p, largest, left,
        state[-2], state[-1], sums[-1], masses, ties, PASSES, chunks,
        vocab, BLOCK, BLOCKS, WAYS, num_warps=8, **early,
    )  # fmt: skip
    _pick[(rows,)](
        logits, maxima, temperature, top_k, min_p, uniform, largest, left,
        state[-1], masses, ties, tokens, chunks,
        vocab, BLOCK, BLOCKS, triton.next_power_of_2(chunks), num_warps=8, **early,
    )  # fmt: skip
