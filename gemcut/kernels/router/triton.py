"""Routing on the GPU in one launch for up to 16 tokens, in two for more; nothing waits for the host.

`_route` takes BM tokens a program, or SPLIT x PIECES programs for them, each with some of the experts and
a piece of the sum: few tokens are bound by reading the router's weight, which one multiprocessor cannot do
fast. The last of them to finish adds the pieces up, in their order, and chooses. With one tile of tokens
it also writes the order; with several, each tile leaves its counts of tokens by expert, and `_order` turns
them into places.
"""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from gemcut.kernels.backend import Backend
from gemcut.kernels.overlap import after_previous, overlap
from gemcut.kernels.router.op import Routing

PROGRAMS = 128  # that share one tile's product, or a few tiles'
EARLY = 32  # up to so many tokens, half as many programs ask for their weights at once, and early
EARLY_K = 512
MAX_TILES = 64  # tiles of tokens whose experts are split; more tiles fill the chip without


@triton.jit
def _product(
    r_ptr, weight_ptr, rows, experts, size, begin, stop,
    H: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EARLY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Logits [BM, BN] in fp32, summed over [begin, stop) of H. Rows of padding may hold anything.

    EARLY: the first BK weights, often all, are asked for before the kernel that computes r is over.
    """
    row_mask = (rows < size)[:, None]
    expert_mask = (experts < E)[None, :]
    inner = tl.arange(0, BK)
    r = r_ptr + rows.to(tl.int64)[:, None] * H + inner[None, :]
    w = weight_ptr + experts[None, :] * H + inner[:, None]
    total = tl.zeros([BM, BN], tl.float32)
    if EARLY:
        inside = inner < stop - begin
        b = tl.load(w + begin, expert_mask & inside[:, None], other=0.0)
        after_previous(OVERLAP)
        a = tl.load(r + begin, row_mask & inside[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        begin += BK
    else:
        after_previous(OVERLAP)
    for k in range(begin, stop, BK):
        inside = inner < stop - k
        a = tl.load(r + k, row_mask & inside[None, :], other=0.0)
        b = tl.load(w + k, expert_mask & inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _pack(logits, expert, EP: tl.constexpr, NARROW: tl.constexpr):
    """Logit and expert as one integer: larger logit first, then lower expert. Returns keys, and what is below
    them all. NARROW: of logits that were rounded to 16 bits the last 13 bits hold nothing."""
    bits = logits.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if NARROW:
        keys = (ordered & -0x2000) | (EP - 1 - expert)
        least = tl.full([], -0x80000000, tl.int32)
    else:
        keys = (ordered.to(tl.int64) << 32) | (EP - 1 - expert)
        least = tl.full([], -0x8000000000000000, tl.int64)
    return keys, least


@triton.jit
def _unpack(keys, EP: tl.constexpr, NARROW: tl.constexpr):
    """(logits, experts) of keys."""
    if NARROW:
        expert = EP - 1 - (keys & 0x1FFF)
        ordered = tl.where(keys < 0, keys | 0x1FFF, keys & -0x2000)
    else:
        expert = (EP - 1 - (keys & 0x7FFFFFFF)).to(tl.int32)
        ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True), expert


@triton.jit
def _choose(
    logits, scale, rows, tile, count, size,
    weights_ptr, experts_ptr, order_ptr, offsets_ptr, ranks_ptr, counts_ptr,
    E: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr,
    ONE_TILE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Top K of each row of rounded logits [BM, EP], their weights, and their places in the order.
    scale: [EP]."""
    expert = tl.arange(0, EP)[None, :]
    slot = tl.arange(0, KP)[None, :]
    real = rows < count
    within = rows < size
    # not a number: never chosen before one, and still a valid expert, chosen once
    left = tl.where(logits == logits, tl.maximum(logits, -3.0e38), -3.0e38) + 0.0  # -0.0 becomes 0.0
    left = tl.where(expert < E, left, float("-inf"))
    top = tl.max(left, 1)
    mass = tl.sum(tl.exp(left - top[:, None]), 1)
    # by logit, ties to the lowest expert: the softmax keeps this order
    keys, least = _pack(left, expert, EP, NARROW)
    best_keys = tl.zeros([BM, KP], keys.dtype) + least
    for k in tl.static_range(K):
        best = tl.max(keys, 1)[:, None]
        best_keys = tl.where(slot == k, best, best_keys)
        keys = tl.where(keys == best, least, keys)
    chosen = real[:, None] & (expert < E) & (keys == least)
    chosen_logits, chosen_experts = _unpack(best_keys, EP, NARROW)
    chosen_experts = tl.where(slot < K, chosen_experts, 0)
    chosen_logits = tl.where(slot < K, chosen_logits, float("-inf"))
    probability = tl.exp(chosen_logits - top[:, None]) / mass[:, None]
    scale = tl.gather(tl.broadcast_to(scale[None, :], logits.shape), chosen_experts, 1)
    weight = probability / tl.sum(probability, 1)[:, None] * scale
    pair = rows.to(tl.int64)[:, None] * K + slot
    written = within[:, None] & (slot < K)
    # rows of padding: any distinct experts and no weight
    weight = tl.where(real[:, None], weight, 0.0)
    chosen_experts = tl.where(real[:, None], chosen_experts, slot)
    tl.store(weights_ptr + pair, weight, written)
    tl.store(experts_ptr + pair, chosen_experts.to(tl.int64), written)

    taken = chosen.to(tl.int32)
    before = tl.cumsum(taken, 0) - taken  # this tile's earlier tokens of the same expert
    by_expert = tl.sum(taken, 0)
    if ONE_TILE:
        ends = tl.cumsum(by_expert, 0)
        expert_row = tl.arange(0, EP)
        tl.store(offsets_ptr + 1 + expert_row, ends.to(tl.int64), expert_row < E)
        tl.store(offsets_ptr, tl.zeros([], tl.int64))
        before += (ends - by_expert)[None, :]
    else:
        tl.store(counts_ptr + tile * EP + tl.arange(0, EP), by_expert)
    place = tl.gather(before, chosen_experts, 1)
    if ONE_TILE:
        # the pairs of padding follow all others, as they come
        place = tl.where(real[:, None], place, pair.to(tl.int32))
        tl.store(order_ptr + place, pair, written)
    else:
        tl.store(ranks_ptr + pair, place, written)


@triton.jit(do_not_specialize=["size"])
def _route(
    r_ptr, weight_ptr, scale_ptr, count_ptr, logits_ptr, arrivals_ptr,
    weights_ptr, experts_ptr, order_ptr, offsets_ptr, ranks_ptr, counts_ptr, size,
    H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PIECES: tl.constexpr, ONE_TILE: tl.constexpr,
    WIDTH: tl.constexpr, EARLY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    rows = tile * BM + tl.arange(0, BM)
    BN: tl.constexpr = EP // SPLIT
    part = tl.program_id(1) % SPLIT
    piece = tl.program_id(1) // SPLIT
    experts = part * BN + tl.arange(0, BN)
    NARROW: tl.constexpr = r_ptr.dtype.element_ty.primitive_bitwidth == 16 and EP <= 0x2000
    begin = piece * WIDTH
    everyone = tl.arange(0, EP)
    scale = tl.load(scale_ptr + everyone, everyone < E, other=0.0).to(tl.float32)
    logits = _product(
        r_ptr, weight_ptr, rows, experts, size, begin, tl.minimum(begin + WIDTH, H),
        H, E, BM, BN, BK, EARLY, OVERLAP,
    )  # fmt: skip
    count = tl.load(count_ptr)
    if SPLIT * PIECES == 1:
        _choose(
            logits.to(r_ptr.dtype.element_ty).to(tl.float32), scale, rows, tile, count, size,
            weights_ptr, experts_ptr, order_ptr, offsets_ptr, ranks_ptr, counts_ptr,
            E, K, EP, KP, BM, ONE_TILE, NARROW,
        )  # fmt: skip
    else:
        at = logits_ptr + tile * (PIECES * BM * EP) + tl.arange(0, BM)[:, None] * EP
        within = (rows < size)[:, None]
        tl.store(at + piece * (BM * EP) + experts[None, :], logits, within)
        tl.debug_barrier()  # all threads' stores come before the arrival that publishes them
        arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel")
        if arrived & (SPLIT * PIECES - 1) == SPLIT * PIECES - 1:
            tl.debug_barrier()
            whole = tl.zeros([BM, EP], tl.float32)
            for i in tl.static_range(PIECES):
                # .cg: past this multiprocessor's L1, which other programs' stores do not reach
                whole += tl.load(at + i * (BM * EP) + everyone[None, :], within, 0.0, cache_modifier=".cg")
            _choose(
                whole.to(r_ptr.dtype.element_ty).to(tl.float32), scale, rows, tile, count, size,
                weights_ptr, experts_ptr, order_ptr, offsets_ptr, ranks_ptr, counts_ptr,
                E, K, EP, KP, BM, ONE_TILE, NARROW,
            )  # fmt: skip


@triton.jit(do_not_specialize=["size", "tiles"])
def _order(
    experts_ptr, ranks_ptr, counts_ptr, count_ptr, order_ptr, offsets_ptr, size, tiles,
    E: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Every tile sums all tiles' counts (some 64 KB from L2) rather than wait for a launch between."""
    after_previous(OVERLAP)
    tile = tl.program_id(0)
    expert = tl.arange(0, EP)
    earlier = tl.zeros([EP], tl.int32)
    whole = tl.zeros([EP], tl.int32)
    for first in range(0, tiles, CHUNK):
        others = first + tl.arange(0, CHUNK)
        counts = tl.load(
            counts_ptr + others[:, None] * EP + expert[None, :], (others < tiles)[:, None], other=0
        )
        whole += tl.sum(counts, 0)
        earlier += tl.sum(tl.where((others < tile)[:, None], counts, 0), 0)
    ends = tl.cumsum(whole, 0)
    start = ends - whole + earlier
    if tile == 0:
        tl.store(offsets_ptr + 1 + expert, ends.to(tl.int64), expert < E)
        tl.store(offsets_ptr, tl.zeros([], tl.int64))
    pair = tl.arange(0, BLOCK)
    flat = tile.to(tl.int64) * (BM * K) + pair
    within = (pair < BM * K) & (flat < size * K)
    chosen = tl.load(experts_ptr + flat, within, other=0).to(tl.int32)
    place = tl.load(ranks_ptr + flat, within, other=0) + tl.gather(start, chosen, 0)
    place = tl.where(flat < tl.load(count_ptr).to(tl.int64) * K, place, flat.to(tl.int32))
    tl.store(order_ptr + place, flat, within)


@cache
def _arrivals(weight: int, programs: int, device: torch.device) -> torch.Tensor:
    """Counters of one router, told apart by where its weight lies, for launches of so many programs a tile.

    They only ever go up, by `programs` a launch (a power of two, so that wrapping is harmless): nobody sets
    them back. Launches of one router must follow one another; those of two may overlap.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("route_experts must have run once before it is captured")
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def route_experts(
    r: torch.Tensor,
    weight: torch.Tensor,
    per_expert_scale: torch.Tensor,
    count: torch.Tensor,
    *,
    top_k: int,
    backend: Backend,
) -> Routing:
    size, hidden = r.shape
    num_experts, device = weight.shape[0], r.device
    padded = max(16, triton.next_power_of_2(num_experts))
    # 16 rows are the least that a product takes, and the shape of all if bits must not depend on the batch;
    # few tokens are chosen for by several processors rather than in one launch
    tile = 16 if size <= 128 or backend.deterministic else 64
    tiles = triton.cdiv(size, tile)
    # from 64 tiles on, reading r once counts for more than filling the chip
    split = 1 if tiles > MAX_TILES or backend.deterministic else min(8, padded // 16)
    pieces = 1
    early = split > 1 and size <= EARLY
    while split > 1 and 2 * pieces * split * tiles <= (PROGRAMS // 2 if early else PROGRAMS):
        pieces *= 2
    block_k = 64 if r.element_size() == 4 else EARLY_K if early else 128
    unit = 32 if early else block_k  # of a piece's width; wide loads begin there
    weights = torch.empty(size, top_k, dtype=torch.float32, device=device)
    experts = torch.empty(size, top_k, dtype=torch.int64, device=device)
    order = torch.empty(size * top_k, dtype=torch.int64, device=device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int64, device=device)
    logits = arrivals = ranks = counts = None
    if split > 1:
        logits = torch.empty(tiles, pieces, tile, padded, dtype=torch.float32, device=device)
        arrivals = _arrivals(weight.data_ptr(), split * pieces, device)
    if tiles > 1:
        ranks = torch.empty(size * top_k, dtype=torch.int32, device=device)
        counts = torch.empty(tiles, padded, dtype=torch.int32, device=device)
    _route[(tiles, split * pieces)](
        r, weight, per_expert_scale, count, logits, arrivals,
        weights, experts, order, offsets, ranks, counts, size,
        hidden, num_experts, top_k, padded, triton.next_power_of_2(top_k),
        tile, block_k, split, pieces, tiles == 1,
        triton.cdiv(hidden, pieces * unit) * unit, early,
        num_warps=8 if tile == 64 else 4, num_stages=2 if early else 5 if split > 1 else 3,
        **overlap(device),
    )  # fmt: skip
    if tiles > 1:
        _order[(tiles,)](
            experts, ranks, counts, count, order, offsets, size, tiles,
            num_experts, top_k, padded, tile, triton.next_power_of_2(tile * top_k), 32, num_warps=4,
            **overlap(device),
        )  # fmt: skip
    return Routing(weights, experts, order, offsets)
