"""Attention over paged KV in plain torch: fp32 inside, one rounding. Runs anywhere.

Three forms of the same mathematics. Prefill rows go one by one, decode rows all at once. The
deterministic form cuts queries and keys into tiles at fixed absolute positions, so that what a query
gets does not depend on the chunk, the batch or the cache it is computed with: every product has one
shape, and tiles are reduced in ascending order.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn import functional

QUERY_TILE = 16  # positions
KEY_TILE = 64  # positions
KEYS_AT_ONCE = 4096  # of decode rows: what is gathered should still be in a CPU's cache when it is read
QUERIES_AT_ONCE = 256  # of a prefill row: bounds the memory of its scores
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
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    if deterministic:
        return _attend_tiled(q, k_pages, v_pages, page_table, starts, lengths, spans, window)
    counts = [stop - start for start, stop in pairwise(starts)]
    single = [row for row, count in enumerate(counts) if count == 1]  # decode rows
    if len(single) == len(q) == len(counts):  # nothing else: as they are
        return _attend_decode(q, k_pages, v_pages, page_table, seq_lens, window)
    out = torch.zeros_like(q)
    for row, count in enumerate(counts):
        if count > 1:
            some = slice(starts[row], starts[row + 1])
            block = None if spans is None else spans[some]
            out[some] = _attend_row(q[some], k_pages, v_pages, page_table[row], lengths[row], block, window)
    if single:
        at = [starts[row] for row in single]
        out[at] = _attend_decode(q[at], k_pages, v_pages, page_table[single], seq_lens[single], window)
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
    """One row: q [C, Hq, D] at positions length - C .. length - 1.

    Product, softmax and product one by one, as in the reference's eager attention: fp32 logits of tiny
    nets are then equal bit by bit, which they are not through scaled_dot_product_attention.
    """
    count, q_heads, head = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    first = 0 if window is None else max(0, length - count - window + 1)
    base = first // page_size * page_size
    used = pages[first // page_size : -(-length // page_size)]
    keys, values = (
        pool.index_select(0, used).flatten(0, 1)[first - base : length - base].float().transpose(0, 1)
        for pool in (k_pages, v_pages)
    )  # [Hk, n, D]
    k = torch.arange(first, length, device=q.device)
    out = torch.empty_like(q)
    for start in range(0, count, QUERIES_AT_ONCE):
        some = slice(start, min(count, start + QUERIES_AT_ONCE))
        p = torch.arange(length - count + some.start, length - count + some.stop, device=q.device)
        seen = _seen(p, k, None if spans is None else spans[some], window)  # [C, n]
        # queries of one KV head side by side: [Hk, C * G, D]; scale is exactly 1.0 (spec 2.1)
        grouped = q[some].float().view(len(p), kv_heads, -1, head).transpose(0, 1).flatten(1, 2)
        scores = grouped @ keys.transpose(1, 2)
        hidden = ~seen.repeat_interleave(q_heads // kv_heads, dim=0)
        attended = scores.masked_fill_(hidden, NEVER).softmax(dim=-1) @ values
        attended = attended.view(kv_heads, len(p), -1, head).transpose(0, 1)
        out[some] = attended.reshape(len(p), q_heads, head).to(q.dtype)
    return out


def _attend_decode(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    window: int | None,
) -> torch.Tensor:
    """R rows of one query each: q [R, Hq, D] at positions lengths[r] - 1; lengths: int32 [R].

    No query is in a vision block: those are never alone in a chunk unless the block has one token.
    """
    rows, _, head = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    length = lengths[:, None]
    first = torch.zeros_like(length) if window is None else (length - window).clamp(min=0)
    first_page, last_page = first // page_size, (length - 1) // page_size
    width = int((last_page - first_page).max()) + 1
    places = first_page + torch.arange(width, dtype=torch.int32, device=q.device)
    pages = page_table.gather(1, torch.minimum(places, last_page).long())  # [R, P]
    in_page = torch.arange(page_size, dtype=torch.int32, device=q.device)
    k = (places[:, :, None] * page_size + in_page).flatten(1)  # [R, n] positions
    seen = (k >= first) & (k < length)
    slots = (pages[:, :, None] * page_size + in_page).flatten(1)
    # A key that is not seen may be anything, NaN included: the row's newest one is read in its place.
    own = slots.gather(1, (length - 1 - first_page * page_size).long())
    slots = torch.where(seen, slots, own)
    grouped = q.float().view(rows, kv_heads, -1, head)  # heads of one KV head are queries of one product
    out = torch.empty_like(grouped)
    portion = max(1, KEYS_AT_ONCE // slots.shape[1])
    for begin in range(0, rows, portion):
        at = slice(begin, begin + portion)
        keys, values = (
            pool.flatten(0, 1).index_select(0, slots[at].flatten()).float().unflatten(0, (-1, slots.shape[1]))
            for pool in (k_pages, v_pages)
        )  # [R, n, Hk, D]
        out[at] = functional.scaled_dot_product_attention(
            grouped[at],
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=seen[at, None, None],
            scale=1.0,
        )
    return out.view(q.shape).to(q.dtype)


def _attend_tiled(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    starts: list[int],
    lengths: list[int],
    spans: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """All rows, in tiles of [QUERY_TILE x KEY_TILE] absolute positions; each query tile walks its key
    tiles in ascending order.

    A key tile in which a query sees nothing leaves its running maximum, sum and output as they are, bit
    for bit. So neither the other queries of its tile nor the walks of other tiles matter to it.
    """
    device, head = q.device, q.shape[2]
    page_size, kv_heads = k_pages.shape[1:3]
    group = q.shape[1] // kv_heads
    begins, ends = (torch.tensor(values, device=device) for values in (starts, lengths))
    counts = begins.diff()
    row_of = torch.arange(len(lengths), device=device).repeat_interleave(counts)
    if not len(row_of):
        return torch.zeros_like(q)
    position = torch.arange(len(row_of), device=device) + (ends - begins[1:])[row_of]
    # query tiles of all rows: each token's tile and place in it, each tile's row and first position
    base, place = position // QUERY_TILE * QUERY_TILE, position % QUERY_TILE
    opens = torch.ones_like(row_of, dtype=torch.bool)
    opens[1:] = (row_of.diff() != 0) | (base.diff() != 0)
    tile_of = opens.cumsum(0) - 1
    rows, bases = row_of[opens], base[opens]
    length, count = ends[rows][:, None], counts[rows][:, None]
    p = bases[:, None] + torch.arange(QUERY_TILE, device=device)  # [E, QUERY_TILE]
    absent = (p < length - count) | (p >= length)
    placed = torch.zeros(len(rows), QUERY_TILE, kv_heads, group, head, device=device)
    placed[tile_of, place] = q[: len(place)].float().view(-1, kv_heads, group, head)
    grouped = placed.transpose(1, 2).reshape(-1, QUERY_TILE * group, head)  # [E * Hk, ...]
    bounds = None
    if spans is not None:
        bounds = torch.zeros(len(rows), QUERY_TILE, 2, dtype=spans.dtype, device=device)
        bounds[tile_of, place] = spans[: len(place)]
    lowest = torch.zeros_like(length) if window is None else (length - count - window + 1).clamp(min=0)
    if window is not None:  # a tile begins its walk at its own window
        lowest = torch.maximum(lowest, bases[:, None] - window + 1)
    first_tile = lowest // KEY_TILE
    highest = torch.full((len(rows), kv_heads, QUERY_TILE * group, 1), NEVER, device=device)
    total = torch.zeros_like(highest)
    out = torch.zeros(len(rows), kv_heads, QUERY_TILE * group, head, device=device)
    table = page_table[rows]
    walks = int(((length - 1) // KEY_TILE - first_tile).max()) + 1
    for step in range(walks):
        k = (first_tile + step) * KEY_TILE + torch.arange(KEY_TILE, device=device)  # [E, KEY_TILE]
        unread = (k < lowest) | (k >= length)
        read = torch.where(unread, length - 1, k)  # in place of what may be anything, the row's newest key
        page = table.gather(1, read // page_size)
        slots = (page * page_size + read % page_size).flatten()
        keys, values = (
            pages.flatten(0, 1).index_select(0, slots).view(-1, KEY_TILE, kv_heads, head).float()
            for pages in (k_pages, v_pages)
        )  # [E, KEY_TILE, Hk, D]
        seen = _seen(p, k[:, None], bounds, window) & ~absent[:, :, None] & ~unread[:, None]
        hidden = ~seen[:, None, :, None].expand(-1, -1, -1, group, -1).flatten(2, 3)
        scores = torch.bmm(grouped, keys.permute(0, 2, 3, 1).reshape(-1, head, KEY_TILE))
        scores = scores.view(len(rows), kv_heads, -1, KEY_TILE).masked_fill(hidden, NEVER)
        risen = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
        shift = risen.masked_fill(risen == NEVER, 0.0)  # nothing seen so far: all weights are zero
        weights = (scores - shift).exp()
        fade = (highest - shift).exp()
        total = total * fade + weights.sum(dim=-1, keepdim=True)
        added = torch.bmm(weights.flatten(0, 1), values.transpose(1, 2).reshape(-1, KEY_TILE, head))
        out = out * fade + added.view_as(out)
        highest = risen
    out = (out / total).view(len(rows), kv_heads, QUERY_TILE, group, head).transpose(1, 2).to(q.dtype)
    return functional.pad(out[tile_of, place].flatten(1, 2), (0, 0, 0, 0, 0, q.shape[0] - len(place)))


def _seen(p: torch.Tensor, k: torch.Tensor, spans: torch.Tensor | None, window: int | None) -> torch.Tensor:
    """bool [..., queries, keys]: (causal or same block) and window (spec 3).

    p: [..., queries] positions. k: [..., 1, keys] positions. spans: [..., queries, 2].
    """
    p = p[..., None]
    seen = k <= p
    if spans is not None:
        seen = seen | ((k >= spans[..., :1]) & (k < spans[..., 1:]))
    if window is not None:
        seen = seen & (k > p - window)
    return seen
