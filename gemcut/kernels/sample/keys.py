"""What the sampling kernels share: logits as integers in their order, probabilities as exact masses."""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

LEAST = tl.constexpr(-0x80000000)  # a key below that of -inf: a banned id comes before none


@triton.jit
def divisor(temperature_ptr, top_k_ptr):
    """(what a row's logits are divided by, how many tokens it keeps): a greedy row keeps one."""
    temperature = tl.load(temperature_ptr)
    return tl.where(temperature > 0, temperature, 1.0), tl.where(temperature > 0, tl.load(top_k_ptr), 1)


@triton.jit
def scaled_logits(logits, by):
    """Logits divided as the reference does, to the bit. One that is not a number counts as banned: the row
    fails elsewhere, its token must be an id."""
    return tl.div_rn(tl.where(logits == logits, logits, float("-inf")), by) + 0.0  # -0.0 becomes 0.0


@triton.jit
def ordered(value):
    """int32 keys in the order of fp32 values."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The fp32 value of an int32 key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_blocks(
    logits_ptr, maxima_ptr, first, by, least, V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """(keys, scaled logits, ids) of a row's blocks from `first` on, each flat: [BLOCKS * BLOCK].

    Blocks without a key from `least` on are not read; what was not read has the key LEAST.
    """
    ALL: tl.constexpr = (V + BLOCK - 1) // BLOCK
    block = first + tl.arange(0, BLOCKS)
    maxima = tl.load(maxima_ptr + block, block < ALL, other=float("-inf"))
    wanted = (ordered(scaled_logits(maxima, by)) >= least) & (block < ALL)
    ids = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = wanted[:, None] & (ids < V)
    value = scaled_logits(tl.load(logits_ptr + ids, inside, other=float("-inf")), by)
    keys = tl.where(inside, ordered(value), LEAST)
    size: tl.constexpr = BLOCKS * BLOCK
    return tl.reshape(keys, [size]), tl.reshape(value, [size]), tl.reshape(ids, [size])


@triton.jit
def _unsigned(key):
    """Signed order to unsigned, so that bits compare from the top."""
    return (key ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def top_bits(low, high):
    """(what all keys of [low, high] begin with, the first bit in which they may differ), unsigned."""
    differing = _unsigned(low) ^ _unsigned(high)
    bit = tl.full([], 0x80000000, tl.uint32)
    equal = tl.zeros([], tl.uint32)
    while bit > differing:
        equal = equal | bit
        bit = bit >> 1
    return _unsigned(high) & equal, bit


@triton.jit
def edge_of(keys, weights, target, slack, low, high):
    """(the largest edge that `target` reaches, by what): where the weights of keys from it on sum to it.

    Bit by bit: some 20 sums in registers are fewer and cheaper steps than a sort has. An edge that is
    reached by up to `slack` more will do. low, high: between which the keys lie that count.
    """
    value = _unsigned(keys)
    edge, bit = top_bits(low, high)
    reached = tl.sum(tl.where(value >= edge, weights, 0), 0)
    while (bit > 0) & (reached > target + slack):
        reaching = tl.sum(tl.where(value >= (edge | bit), weights, 0), 0)
        enough_left = reaching >= target
        reached = tl.where(enough_left, reaching, reached)
        edge = tl.where(enough_left, edge | bit, edge)
        bit = bit >> 1
    return edge.to(tl.int32, bitcast=True) ^ -0x80000000, reached


@triton.jit
def mass_of(value, largest):
    """(probability over the largest one's, the same as a multiple of 2^-40): the reference's UNIT."""
    weight = tl.exp(value - tl.maximum(largest, -3.0e38))  # the largest may be -inf
    return weight, (weight * 1099511627776.0).to(tl.int64)


@triton.jit
def enough(total, top_p):
    """The mass that top-p asks for: a token stays while what is before it is less."""
    asked = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    return tl.where(top_p < 1, tl.maximum(asked, 1), total)


@triton.jit
def point_of(uniform, total):
    """Where in a mass the number falls; the product may round up to the total."""
    return tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
