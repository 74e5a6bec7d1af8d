"""Which queries a program of a chunk kernel has."""

from __future__ import annotations

import triton
import triton.language as tl

from gemcut.kernels.ragged import count_tiles, find_tile


@triton.jit
def find_queries(index, start_ptr, tokens, rows, order, BLOCK_T: tl.constexpr, SKIP_SINGLE: tl.constexpr):
    """Tile number `order` of a step's queries, from the last one on: a row's last tiles see the most keys,
    and the heaviest go first.

    index: 0, 1, .. up to a power of two above `rows`. start_ptr: [rows + 1], row r owns queries
    [start[r], start[r + 1]). The padding behind the last row is one row more. SKIP_SINGLE: rows with one
    query have no tile.
    Returns whether there is such a tile; its row, first query and the end of its row's queries.
    """
    begins = tl.load(start_ptr + index, mask=index <= rows, other=tokens)
    ends = tl.load(start_ptr + index + 1, mask=index < rows, other=tokens)
    if SKIP_SINGLE:
        begins = tl.where((ends - begins == 1) & (index < rows), ends, begins)
    tile = count_tiles(begins, ends, BLOCK_T) - 1 - order
    row, first, stop = find_tile(begins, ends, tile, BLOCK_T)
    return tile >= 0, row, first, stop
