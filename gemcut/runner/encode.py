"""Pictures to soft tokens: packs several for one pass of the tower, keeps the results by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from gemcut.data import POOL, EncodeItem, ImagePatches
from gemcut.models.batch import Patches
from gemcut.models.gemma4.model import Gemma4
from gemcut.runner.upload import upload

# Patches in one pass of the tower. A CPU wants its activations in its caches (16 pictures of 630 patches took
# a quarter longer at one go than by twos); a GPU wants to be filled, and memory for activations is finite.
PATCHES_AT_ONCE = {"cpu": 1260, "cuda": 20160}


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
        upload(a, device) for a in (pixels, positions, starts, np.concatenate(grouped))
    )
    return Patches(pixels, positions, starts, joined)


class SoftTokens(Mapping[bytes, torch.Tensor]):
    """Soft tokens of encoded media, by the key that the engine gave them. It decides what stays."""

    def __init__(self, model: Gemma4, device: torch.device) -> None:
        self.model, self.device = model, device
        self.most_patches = PATCHES_AT_ONCE[device.type]
        self._by_key: dict[bytes, torch.Tensor] = {}

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)

    def __getitem__(self, key: bytes) -> torch.Tensor:
        """[S, H] soft tokens of one medium."""
        return self._by_key[key]

    def free(self, key: bytes) -> None:
        del self._by_key[key]

    def encode(self, items: Sequence[EncodeItem]) -> None:
        """Run the tower over all `items`, several at once; attention stays within each picture."""
        for some in portions(items, self.most_patches):
            soft = self.model.encode_images(pack([item.medium for item in some], self.device))
            counts = [item.medium.soft_tokens for item in some]
            for item, part in zip(some, soft.split(counts), strict=True):
                self._by_key[item.key] = part


def portions(items: Sequence[EncodeItem], most_patches: int) -> Iterator[list[EncodeItem]]:
    """Runs of items that have at most so many patches together; one alone may have more."""
    portion, patches = [], 0
    for item in items:
        count = len(item.medium.pixels)
        if portion and patches + count > most_patches:
            yield portion
            portion, patches = [], 0
        portion.append(item)
        patches += count
    yield portion
