"""Which group a tile belongs to, found on the device: grids need only shapes, so that they can be captured.

Groups (rows of a step, pictures, experts) own ranges of a list one after another. A grid has as many tiles
as the groups can need at most; each program finds its own, those left over leave.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(begins, ends, tile, BLOCK: tl.constexpr):
    """begins, ends: int32 ranges of the groups, each cut into tiles of BLOCK.

    Returns the group, the begin of the tile and the end of its group. The caller sees to it that
    tile < count_tiles(begins, ends, BLOCK).
    """
    tiles = (ends - begins + BLOCK - 1) // BLOCK
    passed = tl.cumsum(tiles, 0)
    group = tl.sum((passed <= tile).to(tl.int32), 0)
    chosen = (passed - tiles <= tile) & (tile < passed)
    begin = tl.sum(tl.where(chosen, begins + (tile - passed + tiles) * BLOCK, 0), 0)
    end = tl.sum(tl.where(chosen, ends, 0), 0)
    return group, begin, end


@triton.jit
def count_tiles(begins, ends, BLOCK: tl.constexpr):
    """Tiles of all groups together."""
    return tl.sum((ends - begins + BLOCK - 1) // BLOCK, 0)
