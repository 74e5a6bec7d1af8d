"""The running softmax that the attentions share."""

# triton types what its functions return as never coming back
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp is two


@triton.jit
def soften(scores, best, total):
    """One step over more scores [M, N], -inf where hidden; best, total: [M], so far, in powers of two.

    Returns p [M, N], keep [M] (what earlier sums are multiplied by), best, total. A row that sees nothing
    of this step is left as it is, bit by bit: `best` is kept as it is subtracted, so that keep is exactly 1.
    """
    p, keep, best = raise_best(scores, best)
    return p, keep, best, total * keep + tl.sum(p, 1)


@triton.jit
def raise_best(scores, best):
    """`soften` without the sum, for those who add up p in their own way."""
    best_now = tl.maximum(best, tl.max(scores, 1) * LOG2E)
    shift = tl.where(best_now == float("-inf"), 0.0, best_now)  # nothing seen yet: not inf - inf
    keep = tl.exp2(best - shift)
    p = tl.exp2(scores * LOG2E - shift[:, None])
    return p, keep, best_now
