"""Pictures to soft tokens: packs several for one pass of the tower, keeps the results by key."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gemcut.data import POOL, EncodeItem, ImagePatches
from gemcut.models.batch import Patches
from gemcut.models.gemma4.model import Gemma4


def cells(rows: int, columns: int) -> np.ndarray:
    """int64 [S, 9]: the patches of each soft token of a rows x columns grid, row-major (spec 4.3)."""
    grid = np.arange(rows * columns, dtype=np.int64).reshape(rows // POOL, POOL, columns // POOL, POOL)
    return grid.transpose(0, 2, 1, 3).reshape(-1, POOL * POOL)


def pack(pictures: Sequence[ImagePatches], device: torch.device) -> Patches:
    """Several pictures' patches one after another, on the device."""
    counts = [picture.rows * picture.columns for picture in pictures]
    starts = np.cumsum([0, *counts], dtype=np.int32)
    pixels = np.concatenate([picture.pixels for picture in pictures])
    positions = np.concatenate([picture.positions() for picture in pictures]).astype(np.int64)
    grouped = [cells(p.rows, p.columns) + start for p, start in zip(pictures, starts[:-1], strict=True)]
    pixels, positions, starts, joined = (
        torch.from_numpy(np.ascontiguousarray(a)).to(device)
        for a in (pixels, positions, starts, np.concatenate(grouped))
    )
    return Patches(pixels, positions, starts, joined)


class SoftTokens:
    """Soft tokens of encoded media, by the key that the engine gave them. It decides what stays."""

    def __init__(self, model: Gemma4, device: torch.device) -> None:
        self.model, self.device = model, device
        self._by_key: dict[bytes, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def __getitem__(self, key: bytes) -> torch.Tensor:
        """[S, H] soft tokens of one medium."""
        return self._by_key[key]

    def free(self, key: bytes) -> None:
        del self._by_key[key]

    def encode(self, items: Sequence[EncodeItem]) -> None:
        """Run the tower once over all `items`; attention stays within each picture."""
        soft = self.model.encode_images(pack([item.medium for item in items], self.device))
        counts = [item.medium.soft_tokens for item in items]
        for item, part in zip(items, soft.split(counts), strict=True):
            self._by_key[item.key] = part
