"""A step's integers become a batch's tensors: positions, page slots, spans, soft-token places."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gemcut.data import PageRun, Row, Seat, Step
from gemcut.models.batch import Batch, PagedRows
from gemcut.runner.encode import SoftTokens


class PageTables:
    """Each slot's page tables on the host, int32 [slots, pages of the longest sequence]; -1 is no page."""

    def __init__(self, num_slots: int, max_model_len: int, page_size: int) -> None:
        self.page_size = page_size
        shape = num_slots, -(-max_model_len // page_size)
        self.full = np.full(shape, -1, dtype=np.int32)
        self.sliding = np.full(shape, -1, dtype=np.int32)

    def seat(self, seat: Seat) -> None:
        """A new sequence takes the slot: its tables start empty."""
        self.full[seat.slot] = -1
        self.sliding[seat.slot] = -1

    def extend(self, row: Row) -> None:
        """Enter the pages that a row brings."""
        for table, run in ((self.full, row.full_pages), (self.sliding, row.sliding_pages)):
            if run is not None:
                _enter(table[row.slot], run)


def _enter(entries: np.ndarray, run: PageRun) -> None:
    entries[run.index : run.index + len(run.pages)] = run.pages


@dataclass(frozen=True, slots=True)
class Late:
    """Decode rows: their token is the one that their slot sampled last, still on the device."""

    tokens: torch.Tensor  # int64, places in the batch
    slots: torch.Tensor  # int64


def build(
    step: Step, tables: PageTables, soft: SoftTokens, last_tokens: torch.Tensor, device: torch.device
) -> Batch:
    """The batch of a step whose seats and pages are entered. `last_tokens`: int64 [slots] on the device."""
    rows = step.rows
    counts = np.array([row.count for row in rows], dtype=np.int64)
    starts = np.array([row.start for row in rows], dtype=np.int64)
    slots = np.array([row.slot for row in rows], dtype=np.int64)
    query_start = np.concatenate([[0], counts.cumsum()])
    total = int(query_start[-1])
    positions = np.arange(total) + np.repeat(starts - query_start[:-1], counts)
    token_ids = np.zeros(total, dtype=np.int64)
    late = []
    for i, row in enumerate(rows):
        if row.token_ids is None:
            late.append(i)
        else:
            token_ids[query_start[i] : query_start[i + 1]] = row.token_ids
    of_token = np.repeat(slots, counts)
    width = int(-(-(starts + counts).max() // tables.page_size))

    def paged(table: np.ndarray) -> PagedRows:
        pages = table[of_token, positions // tables.page_size].astype(np.int64)
        where = pages * tables.page_size + positions % tables.page_size
        where[pages < 0] = -1
        return PagedRows(_to(where, device), _to(table[slots, :width], device))

    ids = _to(token_ids, device)
    if late:
        ids[_to(query_start[late], device)] = last_tokens[_to(slots[late], device)]
    spans = soft_tokens = soft_rows = None
    if any(row.spans for row in rows):
        spans, soft_rows, parts = _place_media(rows, query_start, total, soft)
        spans, soft_rows, soft_tokens = _to(spans, device), _to(soft_rows, device), torch.cat(parts)
    return Batch(
        token_ids=ids,
        positions=_to(positions, device),
        query_start=_to(query_start.astype(np.int32), device),
        seq_lens=_to((starts + counts).astype(np.int32), device),
        sliding=paged(tables.sliding),
        full=paged(tables.full),
        spans=spans,
        soft=soft_tokens,
        soft_rows=soft_rows,
    )


def _place_media(
    rows: tuple[Row, ...], query_start: np.ndarray, total: int, soft: SoftTokens
) -> tuple[np.ndarray, np.ndarray, list[torch.Tensor]]:
    """Vision blocks [T, 2] by position, soft-token rows [T], and the soft tokens they point into.

    Adjacent pictures or frames without text between them are one block (spec 3).
    """
    blocks = np.zeros((total, 2), dtype=np.int32)
    places = np.full(total, -1, dtype=np.int64)
    parts: list[torch.Tensor] = []
    held = 0
    for row, first in zip(rows, query_start[:-1], strict=True):
        merged: list[list[int]] = []
        for span in row.spans:
            start, stop = max(span.start, row.start), min(span.stop, row.start + row.count)
            at = first + start - row.start
            places[at : at + stop - start] = held + np.arange(start, stop) - span.start
            tokens = soft[span.key]
            parts.append(tokens)
            held += tokens.shape[0]
            if span.kind == "audio":
                continue
            if merged and merged[-1][1] == span.start:
                merged[-1][1] = span.stop
            else:
                merged.append([span.start, span.stop])
        for begin, end in merged:
            start, stop = max(begin, row.start), min(end, row.start + row.count)
            at = first + start - row.start
            blocks[at : at + stop - start] = begin, end
    return blocks, places, parts


def _to(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
