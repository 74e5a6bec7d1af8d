"""The way of small host arrays to the device."""

from __future__ import annotations

import numpy as np
import torch


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array on the device. The host does not wait: the copy starts from pinned memory, which torch keeps
    from its next user until it is done."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
