"""The way of small host arrays to the device. The host does not wait for it."""

from __future__ import annotations

import numpy as np
import torch


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array on the device."""
    if device.type == "cpu":
        return torch.from_numpy(np.ascontiguousarray(array))
    return _pinned(array).to(device, non_blocking=True)


def upload_into(place: torch.Tensor, array: np.ndarray) -> None:
    """Fill `place`, which has the array's shape and dtype."""
    source = _pinned(array) if place.is_cuda else torch.from_numpy(array)
    place.copy_(source, non_blocking=True)


def staging(words: int, *, pinned: bool) -> torch.Tensor:
    """int64 [words] of zeros on the host. Torch keeps pinned memory from its next user until copies from it
    are done."""
    block = torch.empty(words, dtype=torch.int64, pin_memory=pinned)
    block.numpy().fill(0)  # on this thread; see _pinned
    return block


def _pinned(array: np.ndarray) -> torch.Tensor:
    """A copy in pinned memory. numpy makes it, on this thread: torch would wake a thread of every core, and
    waiting for the last of 16 made 1 to 8 ms of the 0.2 that a picture takes."""
    host = torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, pin_memory=True)
    np.copyto(host.numpy(), array)
    return host
