"""Routers: tiny ones, and that of 26B-A4B from one token to a long prefill.

Small integers make the logits exact in any order of summation, and full of ties: the chosen experts must be
the reference's. With random values only the weights are compared, and the order by what it means.
"""

from __future__ import annotations

from typing import Any

import torch

from gemcut.kernels.case import Case, MakeInputs, normal
from gemcut.kernels.router.op import route_experts


def _inputs(size: int, real: int, hidden: int, experts: int, top_k: int) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        def integers(*shape: int) -> torch.Tensor:
            # one in 32 is 1 or -1: sums stay small enough for bf16 to hold them, and ties are common
            drawn = torch.randint(-32, 33, shape, generator=generator, device=device)
            return torch.where(drawn.abs() == 32, drawn.sign(), 0).to(dtype)

        r = integers(size, hidden) * 2
        r[real:] = float("nan")  # rows of padding
        return {
            "r": r,
            "weight": integers(experts, hidden),
            "per_expert_scale": normal(generator, device, dtype)(experts, scale=0.2, shift=1.0),
            "count": torch.tensor([real], dtype=torch.int32, device=device),
            "top_k": top_k,
        }

    return make


def _case(
    size: int, hidden: int, experts: int, top_k: int, padding: int = 0, full_size: bool = False
) -> Case:
    return Case(
        name=f"T={size} H={hidden} E={experts} K={top_k} padding={padding}",
        operation=route_experts,
        make_inputs=_inputs(size, size - padding, hidden, experts, top_k),
        outputs=("weights", "experts", "order", "offsets"),
        exact=("experts", "order", "offsets"),
        bytes=2 * hidden * (size + experts) + 2 * experts + 20 * size * top_k + 8 * experts,
        flops=2 * size * hidden * experts,
        full_size=full_size,
        numerics=("reference",),
        capturable_reference=False,  # bincount waits for the device
    )


CASES = (
    _case(1, 48, 8, 2),
    _case(5, 48, 8, 2, padding=2),
    _case(17, 128, 16, 3, padding=1),
    _case(64, 128, 32, 4),
    _case(70, 128, 128, 8, padding=6),
    _case(3, 2816, 128, 8),
    _case(4200, 48, 8, 2, padding=50),
    *(_case(size, 2816, 128, 8, full_size=True) for size in (1, 64, 256, 1024, 8192)),
    _case(8192, 2816, 128, 8, padding=1000, full_size=True),
)
