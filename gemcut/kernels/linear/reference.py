"""The matrix product in plain torch, in two forms."""

from __future__ import annotations

import torch
from torch.nn import functional

ROW_TILE = 16


def product(x: torch.Tensor, weight: torch.Tensor, deterministic: bool) -> torch.Tensor:
    """x W^T. x: [T, K]; weight: [N, K].

    deterministic: in tiles of ROW_TILE rows, so that each product has one shape and a row's bits do not
    depend on how many others there are. (BLAS picks its order of summation by shape.)
    """
    if not deterministic:
        return functional.linear(x, weight)
    count, inputs = x.shape
    tiles = -(-count // ROW_TILE)
    padded = functional.pad(x, (0, 0, 0, tiles * ROW_TILE - count)).view(tiles, ROW_TILE, inputs)
    return torch.bmm(padded, weight.t().expand(tiles, -1, -1)).flatten(0, 1)[:count].contiguous()
