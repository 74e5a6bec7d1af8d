"""One step's inputs as tensors: what a model reads. The runner fills them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False, slots=True)
class PagedRows:
    """Where one page pool holds the rows of a step.

    slots: [T] int64, page * page_size + offset that each token's K and V are written to, -1 for padding.
    table: [R, P] int32, physical page of each run of page_size positions of a row.
    """

    slots: torch.Tensor
    table: torch.Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """T tokens of R rows, one after another.

    token_ids, positions: [T] int64. query_start: [R + 1] int32. seq_lens: [R] int32, new tokens included.
    spans: [T, 2] int32, positions [begin, end) of the token's vision block; None without pictures.
    soft: [S, H] soft tokens; soft_rows: [T] int64, the soft token that replaces a token, or -1. Both or none.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    sliding: PagedRows
    full: PagedRows
    spans: torch.Tensor | None = None
    soft: torch.Tensor | None = None
    soft_rows: torch.Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class LayerKV:
    """K and V pages of one layer, each [pages, page_size, Hk, D]."""

    k_pages: torch.Tensor
    v_pages: torch.Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Patches:
    """Patches of B pictures, one after another.

    pixels: [N, 768] uint8. positions: [N, 2] int64, (x, y). starts: [B + 1] int32.
    cells: [S, 9] int64, the patches of each soft token, row-major within a picture.
    """

    pixels: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    cells: torch.Tensor
