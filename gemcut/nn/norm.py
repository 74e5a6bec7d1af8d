"""The weight of an RMSNorm. The operation itself is part of a fused segment (gemcut.kernels)."""

from __future__ import annotations

import torch
from torch import nn


class Norm(nn.Module):
    """weight [size]; it multiplies directly, not as 1 + w (spec 2.1)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
