"""Linear layers. A fused one holds several checkpoint tensors and declares them."""

from __future__ import annotations

import torch
from torch import nn

from gemcut.kernels import Backend, linear


class Linear(nn.Module):
    """y = x W^T with weight [out, in], no bias."""

    def __init__(self, inputs: int, outputs: int, backend: Backend) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, backend=self.backend)


class FusedLinear(Linear):
    """Several linear layers of one input as one product.

    sources: (name of the layer it stands for, its output rows), in order. The name replaces the
    module's own in checkpoint tensor names: `self_attn.qkv_proj` -> `self_attn.q_proj`.
    """

    def __init__(self, inputs: int, sources: tuple[tuple[str, int], ...], backend: Backend) -> None:
        super().__init__(inputs, sum(rows for _, rows in sources), backend)
        self.sources = sources
