"""Pictures to soft tokens: packs several for one pass of the tower, keeps the results by key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch

from gemcut.data import PATCH, POOL, EncodeItem, ImagePatches
from gemcut.models.batch import Patches
from gemcut.models.gemma4.model import Gemma4
from gemcut.runner.upload import upload, upload_into

# Patches in one pass of the tower. A CPU wants its activations in its caches (16 pictures of 630 patches took
# a quarter longer at one go than by twos); a GPU wants to be filled, and memory for activations is finite.
PATCHES_AT_ONCE = {"cpu": 1260, "cuda": 20160}
MOST_CAPTURED = 5040  # patches in a graph: of more, the device has work for longer than launches take
PICTURES = 16  # in a graph

FindGraph = Callable[[int, int], Callable[[], object] | None]


def cells(rows: int, columns: int) -> np.ndarray:
    """int64 [S, 9]: the patches of each soft token of a rows x columns grid, row-major (spec 4.3)."""
    grid = np.arange(rows * columns, dtype=np.int64).reshape(rows // POOL, POOL, columns // POOL, POOL)
    return grid.transpose(0, 2, 1, 3).reshape(-1, POOL * POOL)


def pack(pictures: Sequence[ImagePatches], device: torch.device) -> Patches:
    """Several pictures' patches one after another, on the device."""
    pixels = np.concatenate([picture.pixels for picture in pictures])
    return Patches(upload(pixels, device), *(upload(array, device) for array in _places(pictures)))


def _places(pictures: Sequence[ImagePatches]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """positions, starts and cells of `Patches`."""
    starts = np.cumsum([0, *(len(picture.pixels) for picture in pictures)], dtype=np.int32)
    positions = np.concatenate([picture.positions() for picture in pictures]).astype(np.int64)
    grouped = [cells(p.rows, p.columns) + start for p, start in zip(pictures, starts[:-1], strict=True)]
    return positions, starts, np.concatenate(grouped)


class PatchInputs:
    """Pictures of up to `MOST_CAPTURED` patches together, at addresses that stay, and what becomes of them.

    soft: [S, H], where the tower's graphs leave the soft tokens.
    """

    def __init__(self, hidden: int, device: torch.device, dtype: torch.dtype) -> None:
        count = MOST_CAPTURED
        self.pixels = torch.zeros(count, PATCH * PATCH * 3, dtype=torch.uint8, device=device)
        self.positions = torch.zeros(count, 2, dtype=torch.int64, device=device)
        self.starts = torch.zeros(PICTURES + 1, dtype=torch.int32, device=device)
        self.cells = torch.zeros(count // POOL**2, POOL**2, dtype=torch.int64, device=device)
        self.soft = torch.zeros(count // POOL**2, hidden, dtype=dtype, device=device)

    def fill(self, pictures: Sequence[ImagePatches]) -> None:
        """Make `patches(...)` those of these pictures; what is behind them belongs to none."""
        assert len(pictures) <= PICTURES, f"{len(pictures)} pictures do not fit into {PICTURES} places"
        positions, starts, joined = _places(pictures)
        behind = np.full(PICTURES + 1 - len(starts), starts[-1], dtype=np.int32)
        upload_into(self.pixels, [picture.pixels for picture in pictures])
        upload_into(self.positions, [positions])
        upload_into(self.starts, [starts, behind])
        upload_into(self.cells, [joined])
        self.cells[len(joined) :].zero_()  # those of pictures before may lie behind the last patch

    def patches(self, count: int) -> Patches:
        return Patches(
            self.pixels[:count], self.positions[:count], self.starts, self.cells[: count // POOL**2]
        )


class SoftTokens(Mapping[bytes, torch.Tensor]):
    """Soft tokens of encoded media, by the key that the engine gave them. It decides what stays."""

    def __init__(self, model: Gemma4, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype
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

    def encode(self, items: Sequence[EncodeItem], find: FindGraph) -> None:
        """Run the tower over all `items`, several at once; attention stays within each picture.

        find: the graph for so many pictures of so many patches together, if there is one.
        """
        for some in portions(items, self.most_patches):
            pictures = [item.medium for item in some]
            replay = find(len(pictures), sum(len(picture.pixels) for picture in pictures))
            if replay is None:
                soft = self.model.encode_images(pack(pictures, self.device))
            else:
                self.inputs.fill(pictures)
                replay()
                soft = self.inputs.soft
            place = 0
            for item in some:
                stop = place + item.medium.soft_tokens
                # a copy of its own: the next pictures come to the same place
                self._by_key[item.key] = soft[place:stop].clone()
                place = stop

    @cached_property
    def inputs(self) -> PatchInputs:
        """What graphs read; memory that is taken when there are any."""
        return PatchInputs(self.model.plan.text.hidden, self.device, self.dtype)

    def run(self, count: int) -> None:
        """The tower over the first `count` patches that were filled in."""
        soft = self.model.encode_images(self.inputs.patches(count))
        self.inputs.soft[: len(soft)].copy_(soft)


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
