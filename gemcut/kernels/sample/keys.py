"""What the sampling kernels share: logits as integers in their order, probabilities as exact masses."""

# triton types neither launches nor constants
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


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
def kth_largest(keys, k):
    """The k-th largest of int32 keys, bit by bit, and how many are above it: 32 counts in registers are fewer
    and cheaper steps than a partial sort has."""
    value = (keys ^ -0x80000000).to(tl.uint32, bitcast=True)  # signed order to unsigned
    edge = tl.zeros([], tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        reaching = tl.sum((value >= (edge | bit)).to(tl.int32), 0)
        edge = tl.where(reaching >= k, edge | bit, edge)
        bit = bit >> 1
    above = tl.sum((value > edge).to(tl.int32), 0)
    return edge.to(tl.int32, bitcast=True) ^ -0x80000000, above


@triton.jit
def mass_of(value, largest):
    """(probability over the largest one's, the same as a multiple of 2^-40): the reference's UNIT."""
    weight = tl.exp(value - largest)
    weight = tl.where(weight == weight, weight, 0.0)  # a row with nothing but -inf
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
