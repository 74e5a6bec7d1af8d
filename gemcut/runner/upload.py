"""The way of small host arrays to the device. The host does not wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array on the device."""
    if device.type == "cpu":
        return torch.from_numpy(np.ascontiguousarray(array))
    host = _pinned(array.shape, torch.from_numpy(array).dtype)
    np.copyto(host.numpy(), array)
    return host.to(device, non_blocking=True)


def upload_into(place: torch.Tensor, arrays: Sequence[np.ndarray]) -> None:
    """Fill the first rows of `place` with the rows of all arrays, which have its dtype."""
    first = place[: sum(map(len, arrays))]
    if not place.is_cuda:
        np.concatenate(arrays, out=first.numpy())
        return
    host = _pinned(first.shape, place.dtype)
    np.concatenate(arrays, out=host.numpy())
    first.copy_(host, non_blocking=True)


def staging(words: int, *, pinned: bool) -> torch.Tensor:
    """int64 [words] of zeros on the host."""
    block = _pinned((words,), torch.int64) if pinned else torch.empty(words, dtype=torch.int64)
    block.numpy().fill(0)
    return block


def _pinned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Pinned memory, which torch keeps from its next user until copies from it are done.

    Fill it with numpy, on the calling thread: torch would wake a thread of every core, and waiting for the
    last of 16 made 1 to 8 ms of what should be 0.2 for a picture.
    """
    return torch.empty(shape, dtype=dtype, pin_memory=True)
