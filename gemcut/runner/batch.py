"""A step's integers become tensors whose addresses never change, so that captured graphs can read them.

Enters: rows. Leaves: the `Batch` of a forward and what sampling reads, all of it views of one block of memory
on the device. A step fills the block with one copy; only new pages and soft tokens are copied beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gemcut.data import Row, Seat
from gemcut.models.batch import Batch, PagedRows
from gemcut.runner.sample import Draws, DrawTensors
from gemcut.runner.upload import staging, upload

# Fields of the block. Each takes a stripe: an even number of words of 8 bytes, so that all begin at multiples
# of 16 bytes, which the kernels are compiled for.
ROW_FIELDS = {
    "slots": np.int64,  # of each row
    "ends": np.int64,  # [L] place of the last token of each row that samples
    "drawn": np.int64,  # [L] its slot
    "top_k": np.int64,
    "uniform": np.float64,
    "temperature": np.float32,
    "top_p": np.float32,
    "min_p": np.float32,
    "query_start": np.int32,
    "seq_lens": np.int32,
}
TOKEN_FIELDS = {
    "ids": np.int64,
    "sources": np.int64,  # word of the block that holds the token's id
    "positions": np.int64,
    "sliding": np.int64,  # page slots of the two pools
    "full": np.int64,
    "soft_rows": np.int64,
    "spans": np.int32,  # two a token
}
POOLS = ("sliding", "full")  # order of the page tables
_TORCH = {
    np.int64: torch.int64,
    np.float64: torch.float64,
    np.float32: torch.float32,
    np.int32: torch.int32,
}
# of each field: which of its kind it is, its dtypes, and how many values a word holds
_FIELDS = {
    name: (index, dtype, _TORCH[dtype], 8 // np.dtype(dtype).itemsize)
    for fields in (ROW_FIELDS, TOKEN_FIELDS)
    for index, (name, dtype) in enumerate(fields.items())
}


@dataclass(frozen=True, slots=True)
class Size:
    """What a forward is shaped by. tokens, rows: those of a step may be fewer, the rest is padding.

    pages: columns of the page tables. media: soft tokens and vision blocks are looked at.
    """

    tokens: int
    rows: int
    pages: int
    media: bool


class PageTables:
    """Each slot's page tables, int32 [pools, slots, pages of the longest sequence], here and on the device.

    Here -1 is no page. On the device entries that nobody may read are whatever they were.
    """

    def __init__(self, num_slots: int, max_model_len: int, page_size: int, device: torch.device) -> None:
        self.num_slots, self.page_size = num_slots, page_size
        self.width = -(-max_model_len // page_size)
        self.host = np.full((len(POOLS), num_slots, self.width), -1, dtype=np.int32)
        self.device = torch.zeros(self.host.shape, dtype=torch.int32, device=device)

    def enter(self, seats: Sequence[Seat], rows: Sequence[Row]) -> None:
        """New sequences start with empty tables; the pages that rows bring join theirs."""
        for seat in seats:
            self.host[:, seat.slot] = -1
        places: list[int] = []
        pages: list[int] = []
        for row in rows:
            for pool, run in enumerate((row.sliding_pages, row.full_pages)):
                if run is not None:
                    self.host[pool, row.slot, run.index : run.index + len(run.pages)] = run.pages
                    first = (pool * self.num_slots + row.slot) * self.width + run.index
                    places += range(first, first + len(run.pages))
                    pages += run.pages
        if places:
            new = upload(np.array([places, pages]), self.device.device)
            self.device.view(-1).index_copy_(0, new[0], new[1].int())


class Inputs:
    """What steps of up to `max_tokens` tokens are made of, on the device.

    The block begins with the token that each slot sampled last, and one that nobody reads: padding samples
    as well. `soft` [max_tokens, H] holds the soft tokens of a step, each in its token's place.
    """

    def __init__(self, tables: PageTables, max_tokens: int, soft: torch.Tensor, device: torch.device) -> None:
        self.tables, self.max_tokens, self.soft = tables, max_tokens, soft
        self.max_rows = tables.num_slots + 1
        self._row_stripe = _even(self.max_rows + 1)  # query_start has one entry more than there are rows
        self._begin = _even(tables.num_slots + 1)
        self._tokens_begin = self._begin + len(ROW_FIELDS) * self._row_stripe
        words = self._tokens_begin + len(TOKEN_FIELDS) * _even(max_tokens)
        self.block = torch.zeros(words, dtype=torch.int64, device=device)

    @property
    def last_tokens(self) -> torch.Tensor:
        """int64 [slots + 1]."""
        return self.block[: self.tables.num_slots + 1]

    def fill(self, rows: Sequence[Row], size: Size, soft: Mapping[bytes, torch.Tensor], draws: Draws) -> None:
        """Make `batch(size)` and `draws(...)` those of `rows`, whose pages are entered. soft: by key, [S, H].

        Padding reads id 0 at position 0, writes no page, is no soft token and in no block; rows of padding
        have no tokens and no keys.
        """
        counts = np.array([row.count for row in rows], dtype=np.int64)
        starts = np.array([row.start for row in rows], dtype=np.int64)
        slots = np.array([row.slot for row in rows], dtype=np.int64)
        ends = counts.cumsum()
        total, num_rows = int(ends[-1]), len(rows)
        assert total <= size.tokens <= self.max_tokens, f"{total} tokens do not fit into {size}"
        assert num_rows <= size.rows <= self.max_rows, f"{num_rows} rows do not fit into {size}"
        stop = self._tokens_begin + len(TOKEN_FIELDS) * _even(size.tokens)
        block = staging(stop, pinned=self.block.is_cuda)
        words = block.numpy()

        def field(name: str, count: int) -> np.ndarray:
            return self._field(words, name, count, size.tokens)

        field("slots", num_rows)[:] = slots
        query_start = field("query_start", size.rows + 1)
        query_start[1 : num_rows + 1] = ends
        query_start[num_rows + 1 :] = total
        field("seq_lens", num_rows)[:] = starts + counts
        field("drawn", self.max_rows)[:] = self.tables.num_slots
        num_drawn = len(draws.slots)
        field("ends", num_drawn)[:] = ends[draws.rows] - 1
        field("drawn", num_drawn)[:] = draws.slots
        for name, values in draws.columns.items():
            field(name, num_drawn)[:] = values

        begins = ends - counts
        positions = np.arange(total) + np.repeat(starts - begins, counts)
        field("positions", total)[:] = positions
        of_token = np.repeat(slots, counts)
        places, offsets = np.divmod(positions, self.tables.page_size)
        for pool, table in zip(POOLS, self.tables.host, strict=True):
            pages = table[of_token, places].astype(np.int64)
            where = field(pool, size.tokens)
            where[:total] = np.where(pages < 0, -1, pages * self.tables.page_size + offsets)
            where[total:] = -1
        ids, sources = field("ids", total), field("sources", size.tokens)
        sources[:] = self._place("ids", size.tokens) + np.arange(size.tokens)
        for row, begin, end in zip(rows, begins.tolist(), ends.tolist(), strict=True):
            if row.token_ids is None:
                sources[begin] = row.slot
            else:
                ids[begin:end] = row.token_ids
        if size.media:
            soft_rows = field("soft_rows", size.tokens)
            soft_rows[:] = -1
            self._place_media(rows, begins, soft_rows, field("spans", 2 * total).reshape(-1, 2), soft)
        self.block[self._begin : stop].copy_(block[self._begin :], non_blocking=True)

    def batch(self, size: Size) -> Batch:
        """What `fill` was given, for the model. Ids and page tables are gathered on the device now, the rest
        are views."""

        def field(name: str, count: int) -> torch.Tensor:
            return self._field(self.block, name, count, size.tokens)

        columns = self.tables.device[:, :, : size.pages]
        tables = columns.index_select(1, field("slots", size.rows))
        sliding, full = (
            PagedRows(field(name, size.tokens), table) for name, table in zip(POOLS, tables, strict=True)
        )
        return Batch(
            token_ids=self.block.index_select(0, field("sources", size.tokens)),
            positions=field("positions", size.tokens),
            query_start=field("query_start", size.rows + 1),
            seq_lens=field("seq_lens", size.rows),
            sliding=sliding,
            full=full,
            spans=field("spans", 2 * size.tokens).view(-1, 2) if size.media else None,
            soft=self.soft[: size.tokens] if size.media else None,
            soft_rows=field("soft_rows", size.tokens) if size.media else None,
        )

    def pretend_soft(self, size: Size, some: slice) -> None:
        """Let these tokens of `batch(size)` take what stands in their places in `soft`, whatever they are."""
        places = torch.arange(some.start, some.stop, device=self.block.device)
        self._field(self.block, "soft_rows", size.tokens, size.tokens)[some] = places

    def ends(self, count: int) -> torch.Tensor:
        """int64 [count], places of the tokens whose logits are wanted; those of padding are 0."""
        return self._field(self.block, "ends", count)

    def draws(self, count: int) -> DrawTensors:
        """What the first `count` rows that sample are drawn with."""
        names = ("drawn", "temperature", "top_k", "top_p", "min_p", "uniform")
        return DrawTensors(*(self._field(self.block, name, count) for name in names))

    def _place_media(
        self,
        rows: Sequence[Row],
        begins: np.ndarray,
        soft_rows: np.ndarray,
        blocks: np.ndarray,
        soft: Mapping[bytes, torch.Tensor],
    ) -> None:
        """Copy the soft tokens, say where they are, and enter the vision blocks by position.

        Adjacent pictures or frames without text between them are one block (spec 3).
        """
        for row, first in zip(rows, begins.tolist(), strict=True):
            merged: list[list[int]] = []
            to_token = first - row.start
            row_stop = row.start + row.count
            for span in row.spans:
                start, stop = max(span.start, row.start), min(span.stop, row_stop)
                some = slice(to_token + start, to_token + stop)
                soft_rows[some] = np.arange(some.start, some.stop)
                tokens = soft[span.key][start - span.start : stop - span.start]
                self.soft[some].copy_(tokens, non_blocking=True)
                if span.kind == "audio":
                    continue
                if merged and merged[-1][1] == span.start:
                    merged[-1][1] = span.stop
                else:
                    merged.append([span.start, span.stop])
            for begin, end in merged:
                start, stop = max(begin, row.start), min(end, row_stop)
                blocks[to_token + start : to_token + stop] = begin, end

    def _place(self, name: str, tokens: int) -> int:
        """The first word of a field in steps of so many tokens."""
        index = _FIELDS[name][0]
        if name in ROW_FIELDS:
            return self._begin + index * self._row_stripe
        return self._tokens_begin + index * _even(tokens)

    def _field(self, words: Any, name: str, count: int, tokens: int = 0) -> Any:
        """The first `count` values of a field, as a view. words: int64, of numpy or torch."""
        _, numpy_dtype, torch_dtype, a_word = _FIELDS[name]
        start = self._place(name, tokens)
        dtype: Any = torch_dtype if isinstance(words, torch.Tensor) else numpy_dtype
        return words[start : start - (-count // a_word)].view(dtype)[:count]


def _even(count: int) -> int:
    return count + count % 2
