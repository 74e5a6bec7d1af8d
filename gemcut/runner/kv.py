"""The KV cache's memory: two pools of pages, sliding and full (spec 2.7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gemcut.errors import ConfigError
from gemcut.models.batch import LayerKV
from gemcut.plan import TextPlan, kv_bytes_per_token


@dataclass(frozen=True, slots=True)
class PoolSizes:
    """Pages of each pool. One page id covers `page_size` positions in all layers of its kind."""

    sliding_pages: int
    full_pages: int
    page_size: int

    @classmethod
    def within(
        cls,
        text: TextPlan,
        kv_bytes: int,
        *,
        page_size: int,
        value_bytes: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
    ) -> PoolSizes:
        """Divide `kv_bytes` between the pools.

        The sliding pool gets what `max_num_seqs` full windows and one step's chunks can use, if that
        leaves the full pool a quarter more positions than the sliding pool has; else both shrink in
        that proportion. Neither gets more than can ever be used. Raises ConfigError if not even a page fits.
        """
        sliding = kv_bytes_per_token(text, "sliding", value_bytes) * page_size
        full = kv_bytes_per_token(text, "full", value_bytes) * page_size
        per_seq = -(-max_model_len // page_size) + 1
        in_flight = -(-max_num_batched_tokens // page_size)
        most_full = per_seq * max_num_seqs if full else 0
        window_pages = min(per_seq, -(-(text.window or 0) // page_size) + 2)
        most_sliding = window_pages * max_num_seqs + in_flight if sliding else 0
        if not full:
            sizes = cls(min(most_sliding, kv_bytes // sliding), 0, page_size)
        else:
            share = 4 * kv_bytes // (4 * sliding + 5 * full) if sliding else 0
            sliding_pages = min(most_sliding, share)
            full_pages = min(most_full, (kv_bytes - sliding_pages * sliding) // full)
            sizes = cls(sliding_pages, full_pages, page_size)
        if (sliding and sizes.sliding_pages < 1) or (full and sizes.full_pages < 1):
            raise ConfigError(
                f"{kv_bytes} bytes of KV cache hold no page: one takes {sliding + full} bytes. Give it more."
            )
        return sizes

    def bytes(self, text: TextPlan, value_bytes: int) -> int:
        return self.page_size * (
            self.sliding_pages * kv_bytes_per_token(text, "sliding", value_bytes)
            + self.full_pages * kv_bytes_per_token(text, "full", value_bytes)
        )


class KVPools:
    """Pages of every layer, allocated once. `layers[i]` is what layer i reads and writes."""

    def __init__(self, text: TextPlan, sizes: PoolSizes, device: torch.device, dtype: torch.dtype) -> None:
        self.sizes = sizes
        owned: dict[int, LayerKV] = {}
        for layer in text.layers:
            if layer.owns_kv:
                pages = sizes.sliding_pages if layer.kind == "sliding" else sizes.full_pages
                shape = pages, sizes.page_size, layer.kv_heads, layer.head_dim
                k, v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
                owned[layer.index] = LayerKV(k, v)
        self.layers = [owned[layer.kv_layer] for layer in text.layers]
