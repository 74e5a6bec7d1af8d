"""Attention over paged KV in plain torch: fp32 inside, one rounding. Runs anywhere.

Three forms of the same mathematics. Prefill rows go one by one, decode rows all at once. The
deterministic form cuts queries and keys into tiles at fixed absolute positions, so that what a query
gets does not depend on the chunk, the batch or the cache it is computed with: every product has one
shape, and tiles are reduced in ascending order.
"""

from __future__ import annotations

import torch

QUERY_TILE = 16  # positions
KEY_TILE = 64  # positions
NEVER = float("-inf")


def attend(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    spans: torch.Tensor | None,
    window: int | None,
    deterministic: bool,
) -> torch.Tensor:
    """The contract of `paged_attention`, whose arguments these are."""
    out = torch.zeros_like(q)
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    single = []  # decode rows
    for row, length in enumerate(lengths):
        start, stop = starts[row], starts[row + 1]
        if start == stop:
            continue
        block = None if spans is None else spans[start:stop]
        if deterministic:
            out[start:stop] = _attend_tiled(
                q[start:stop], k_pages, v_pages, page_table[row], length, block, window
            )
        elif stop - start == 1:
            single.append(row)
        else:
            out[start:stop] = _attend_row(
                q[start:stop], k_pages, v_pages, page_table[row], length, block, window
            )
    if single:
        at = [starts[row] for row in single]
        out[at] = _attend_decode(
            q[at], k_pages, v_pages, page_table[single], [lengths[row] for row in single], window
        )
    return out


def _attend_row(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    pages: torch.Tensor,
    length: int,
    spans: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """One row: q [C, Hq, D] at positions length - C .. length - 1."""
    count, q_heads, head = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    first = 0 if window is None else max(0, length - count - window + 1)
    base = first // page_size * page_size
    used = pages[first // page_size : -(-length // page_size)]
    keys = k_pages[used].flatten(0, 1)[first - base : length - base].float()  # [n, Hk, D]
    values = v_pages[used].flatten(0, 1)[first - base : length - base].float()
    # queries of one KV head side by side: [Hk, C * G, D]
    grouped = q.float().view(count, kv_heads, -1, head).transpose(0, 1).flatten(1, 2)
    scores = grouped @ keys.permute(1, 2, 0)  # [Hk, C * G, n]; scale is exactly 1.0 (spec 2.1)
    p = torch.arange(length - count, length, device=q.device)
    k = torch.arange(first, length, device=q.device)
    seen = _seen(p, k, spans, window)
    scores = scores.masked_fill(~seen.repeat_interleave(q_heads // kv_heads, dim=0), NEVER)
    out = scores.softmax(dim=-1) @ values.transpose(0, 1)  # [Hk, C * G, D]
    return out.view(kv_heads, count, -1, head).transpose(0, 1).reshape(q.shape).to(q.dtype)


def _attend_decode(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: list[int],
    window: int | None,
) -> torch.Tensor:
    """R rows of one query each: q [R, Hq, D] at positions lengths[r] - 1. No query is in a vision block:
    those are never alone in a chunk unless the block has one token."""
    rows, _, head = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    length = torch.tensor(lengths, device=q.device)
    first = (length - window).clamp(min=0) if window is not None else torch.zeros_like(length)
    first_page = first // page_size
    width = int(((length - 1) // page_size - first_page).max()) + 1
    index = (first_page[:, None] + torch.arange(width, device=q.device)).clamp(max=page_table.shape[1] - 1)
    # entries behind a row's last page may hold -1: read page 0 instead, and see nothing of it
    used = page_table.gather(1, index).clamp(min=0)
    k = first_page[:, None] * page_size + torch.arange(width * page_size, device=q.device)  # [R, n] positions
    unseen = (k < first[:, None]) | (k >= length[:, None])
    keys = k_pages[used].flatten(1, 2).float()  # [R, n, Hk, D]
    values = v_pages[used].flatten(1, 2).float().masked_fill(unseen[:, :, None, None], 0.0)
    grouped = q.float().view(rows, kv_heads, -1, head)
    scores = grouped @ keys.permute(0, 2, 3, 1)  # [R, Hk, G, n]
    scores = scores.masked_fill(unseen[:, None, None, :], NEVER)
    out = scores.softmax(dim=-1) @ values.transpose(1, 2)
    return out.reshape(q.shape).to(q.dtype)


def _attend_tiled(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    pages: torch.Tensor,
    length: int,
    spans: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """One row in tiles of [QUERY_TILE x KEY_TILE] absolute positions, key tiles in ascending order.

    A tile in which a query sees nothing leaves its running maximum, sum and output as they are, bit for
    bit, so which other queries share the tile does not matter.
    """
    count, q_heads, head = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group, device = q_heads // kv_heads, q.device
    start = length - count
    base, tiles = start // QUERY_TILE * QUERY_TILE, -(-length // QUERY_TILE) - start // QUERY_TILE
    # queries at their place in their tile; the other places stay zero and see nothing
    placed = torch.zeros(tiles * QUERY_TILE, q_heads, head, device=device)
    placed[start - base : start - base + count] = q.float()
    p = torch.arange(base, base + tiles * QUERY_TILE, device=device)
    absent = (p < start) | (p >= length)
    bounds = None
    if spans is not None:
        bounds = torch.zeros(tiles * QUERY_TILE, 2, dtype=spans.dtype, device=device)
        bounds[start - base : start - base + count] = spans
    grouped = placed.view(tiles, QUERY_TILE, kv_heads, group, head).permute(0, 2, 1, 3, 4)
    grouped = grouped.reshape(tiles * kv_heads, QUERY_TILE * group, head)
    highest = torch.full((tiles, kv_heads, QUERY_TILE * group, 1), NEVER, device=device)
    total = torch.zeros_like(highest)
    out = torch.zeros(tiles, kv_heads, QUERY_TILE * group, head, device=device)
    first = 0 if window is None else max(0, start - window + 1)
    for at in range(first // KEY_TILE * KEY_TILE, length, KEY_TILE):
        k = torch.arange(at, at + KEY_TILE, device=device)
        unwritten = (k < first) | (k >= length)
        page = pages[(k // page_size).clamp(max=pages.shape[0] - 1)].clamp(min=0)
        keys = k_pages[page, k % page_size].float().masked_fill(unwritten[:, None, None], 0.0)
        values = v_pages[page, k % page_size].float().masked_fill(unwritten[:, None, None], 0.0)
        seen = _seen(p, k, bounds, window) & ~absent[:, None] & ~unwritten
        hidden = ~seen.view(tiles, 1, QUERY_TILE, 1, KEY_TILE).expand(-1, -1, -1, group, -1).flatten(2, 3)
        many = (tiles, -1, -1, -1)
        scores = torch.bmm(grouped, keys.permute(1, 2, 0).expand(many).reshape(-1, head, KEY_TILE))
        scores = scores.view(tiles, kv_heads, -1, KEY_TILE).masked_fill(hidden, NEVER)
        risen = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
        shift = risen.masked_fill(risen == NEVER, 0.0)  # nothing seen so far: all weights are zero
        weights = (scores - shift).exp()
        fade = (highest - shift).exp()
        total = total * fade + weights.sum(dim=-1, keepdim=True)
        added = torch.bmm(
            weights.flatten(0, 1), values.transpose(0, 1).expand(many).reshape(-1, KEY_TILE, head)
        )
        out = out * fade + added.view_as(out)
        highest = risen
    out = (out / total).view(tiles, kv_heads, QUERY_TILE, group, head).permute(0, 2, 1, 3, 4)
    return out.reshape(-1, q_heads, head)[start - base :][:count].to(q.dtype)


def _seen(p: torch.Tensor, k: torch.Tensor, spans: torch.Tensor | None, window: int | None) -> torch.Tensor:
    """bool [queries, keys]: (causal or same block) and window (spec 3). p, k: positions."""
    seen = k <= p[:, None]
    if spans is not None:
        seen = seen | ((k >= spans[:, :1]) & (k < spans[:, 1:]))
    if window is not None:
        seen = seen & (k > p[:, None] - window)
    return seen
