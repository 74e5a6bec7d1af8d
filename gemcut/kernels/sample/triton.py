"""Choosing tokens on the GPU, without a sort of the vocabulary unless a row may keep most of it.

Greedy: the largest of each chunk, then of the chunks. Top-k of up to 1,024: the best of each chunk as
packed keys, again and again until one program has a row's best, which it draws from. Otherwise one sort.
"""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemcut.kernels.overlap import after_previous, overlap
from gemcut.kernels.sample.reference import draw

CHUNK = 4096  # logits of a program: 64 programs read a row of 262,144
WIDTHS = (64, 1024)  # how many keys a chunk keeps: two kernels to compile, whatever requests ask for


@triton.jit
def _clean(logits):
    """A logit that is not a number counts as banned: the row fails elsewhere, its token must be an id."""
    return tl.where(logits == logits, logits, float("-inf"))


@triton.jit
def _best_of_chunk(
    logits_ptr, values_ptr, ids_ptr, chunks, V: tl.constexpr, CHUNK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    after_previous(OVERLAP)
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = _clean(tl.load(logits_ptr + row * V + index, index < V, other=float("-inf")))
    value, place = tl.max(logits, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(values_ptr + row * chunks + chunk, value)
    tl.store(ids_ptr + row * chunks + chunk, chunk * CHUNK + place)


@triton.jit
def _best_of_row(values_ptr, ids_ptr, tokens_ptr, chunks, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    after_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    values = tl.load(values_ptr + row * chunks + chunk, chunk < chunks, other=float("-inf"))
    _, best = tl.max(values, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(tokens_ptr + row, tl.load(ids_ptr + row * chunks + best).to(tl.int64))


@triton.jit
def _keep_best(keys, out_ptr, WIDTH: tl.constexpr):
    """Store the WIDTH largest of a chunk's keys, in the order that they come in.

    The WIDTH-th largest logit is found bit by bit, 32 counts in registers: fewer and cheaper steps than a
    partial sort has, and keys stay in the order of their ids, so ties at the edge go to the first.
    """
    # signed order to unsigned, so that bits compare from the top
    value = ((keys >> 32).to(tl.int32) ^ -0x80000000).to(tl.uint32, bitcast=True)
    edge = tl.zeros([], tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        reaching = tl.sum((value >= (edge | bit)).to(tl.int32), 0)
        edge = tl.where(reaching >= WIDTH, edge | bit, edge)
        bit = bit >> 1
    above = (value > edge).to(tl.int32)
    tied = (value == edge).to(tl.int32)
    first = tl.cumsum(tied, 0) <= WIDTH - tl.sum(above, 0)
    kept = above | (tied & first.to(tl.int32))
    tl.store(out_ptr + tl.cumsum(kept, 0) - 1, keys, kept > 0)


@triton.jit
def _top_logits(
    logits_ptr, temperature_ptr, keys_ptr, chunks, V: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The WIDTH largest scaled logits of a chunk as keys: larger logit first, then lower id."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = _clean(tl.load(logits_ptr + row * V + index, index < V, other=float("-inf")))
    temperature = tl.load(temperature_ptr + row)
    # a greedy row keeps its logits; the division is the reference's, to the bit
    scaled = tl.div_rn(logits, tl.where(temperature > 0, temperature, 1.0)) + 0.0  # -0.0 becomes 0.0
    bits = scaled.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(index < V, ordered, -0x80000000)  # below -inf: a banned id comes before none
    keys = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    _keep_best(keys, keys_ptr + (row * chunks + chunk) * WIDTH, WIDTH)


@triton.jit(do_not_specialize=["count", "chunks"])
def _top_keys(keys_ptr, out_ptr, count, chunks, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """The WIDTH largest keys of each chunk of a row's `count` keys."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    keys = tl.load(keys_ptr + row * count + index, index < count, other=-0x8000000000000000)
    _keep_best(keys, out_ptr + (row * chunks + chunk) * WIDTH, WIDTH)


@triton.jit
def _draw(
    keys_ptr, sorted_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, tokens_ptr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The reference's draw over a row's WIDTH best keys."""
    row = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, WIDTH)
    keys = tl.load(keys_ptr + row * WIDTH + rank)
    place = tl.zeros([WIDTH], tl.int32)
    for first in range(0, WIDTH, BLOCK):  # no two keys are equal: each has its own place
        others = tl.load(keys_ptr + row * WIDTH + first + tl.arange(0, BLOCK))
        place += tl.sum((others[None, :] > keys[:, None]).to(tl.int32), 1)
    tl.store(sorted_ptr + row * WIDTH + place, keys)
    tl.debug_barrier()
    keys = tl.load(sorted_ptr + row * WIDTH + rank)
    ids = 0x7FFFFFFF - (keys & 0x7FFFFFFF)
    ordered = (keys >> 32).to(tl.int32)
    ranked = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    # a place without an id decodes to no number
    ranked = tl.where((rank < tl.load(top_k_ptr + row)) & (ranked == ranked), ranked, float("-inf"))
    weight = tl.exp(ranked - tl.max(ranked, 0))
    probabilities = tl.div_rn(weight, tl.sum(weight, 0))
    before = tl.cumsum(probabilities, 0) - probabilities
    likeliest = tl.max(probabilities, 0)
    kept = (before < tl.load(top_p_ptr + row)) & (probabilities >= tl.load(min_p_ptr + row) * likeliest)
    probabilities = tl.where(kept, probabilities, 0.0)
    cumulative = tl.cumsum(probabilities.to(tl.float64), 0)
    threshold = tl.load(uniform_ptr + row) * tl.max(cumulative, 0)
    drawn = tl.sum((cumulative <= threshold).to(tl.int32), 0)
    # rounding may carry a draw past the end: the last kept token is meant
    last = tl.max(tl.where(kept & (probabilities > 0), rank, 0), 0)
    drawn = tl.where(tl.load(temperature_ptr + row) > 0, tl.minimum(drawn, last), 0)
    tl.store(tokens_ptr + row, tl.sum(tl.where(rank == drawn, ids, 0), 0))


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    *,
    max_top_k: int | None,
) -> torch.Tensor:
    if max_top_k == 0:
        return _greedy(logits)
    if max_top_k is None or max_top_k > WIDTHS[-1]:
        return draw(logits, temperature, top_k, top_p, min_p, uniform)
    rows, vocab = logits.shape
    width = next(width for width in WIDTHS if width >= max_top_k)
    chunk = min(CHUNK, max(width, triton.next_power_of_2(vocab)))
    chunks = triton.cdiv(vocab, chunk)
    keys = torch.empty(rows, chunks, width, dtype=torch.int64, device=logits.device)
    _top_logits[(rows, chunks)](logits, temperature, keys, chunks, vocab, width, chunk, num_warps=8)
    while chunks > 1:
        count, chunks = chunks * width, triton.cdiv(chunks * width, CHUNK)
        fewer = torch.empty(rows, chunks, width, dtype=torch.int64, device=logits.device)
        _top_keys[(rows, chunks)](keys, fewer, count, chunks, width, CHUNK, num_warps=8)
        keys = fewer
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _draw[(rows,)](
        keys, torch.empty_like(keys), temperature, top_k, top_p, min_p, uniform, tokens,
        width, min(64, 16384 // width),
        num_warps=8 if width > 64 else 4,
    )  # fmt: skip
    return tokens


def _greedy(logits: torch.Tensor) -> torch.Tensor:
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    values = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    early = overlap(logits.device)
    _best_of_chunk[(rows, chunks)](logits, values, ids, chunks, vocab, CHUNK, num_warps=8, **early)
    _best_of_row[(rows,)](values, ids, tokens, chunks, triton.next_power_of_2(chunks), num_warps=1, **early)
    return tokens
