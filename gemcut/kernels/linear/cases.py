"""The dense product: as it is chosen by shape, and with the tile shape of deterministic mode."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from gemcut.kernels.backend import Backend
from gemcut.kernels.case import Case
from gemcut.kernels.linear import op


def make_inputs(
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    *,
    count: int,
    outputs: int,
    inputs: int,
) -> dict[str, Any]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    return {
        "x": normal(count, inputs).to(dtype),
        "weight": (normal(outputs, inputs) * inputs**-0.5).to(dtype),
    }


def deterministic_linear(x: torch.Tensor, weight: torch.Tensor, *, backend: Backend) -> torch.Tensor:
    return op.linear(x, weight, backend=replace(backend, deterministic=backend.kernels == "triton"))


def case(
    count: int, outputs: int, inputs: int, full_size: bool = False, operation: Any = deterministic_linear
) -> Case:
    return Case(
        name=f"T={count} {outputs}x{inputs}",
        operation=operation,
        make_inputs=partial(make_inputs, count=count, outputs=outputs, inputs=inputs),
        outputs=("y",),
        bytes=2 * (count * inputs + outputs * inputs + count * outputs),
        flops=2 * count * outputs * inputs,
        full_size=full_size,
        numerics=("reference",),
        tolerance=2.0,  # in fp32 the order of summation is all that differs
        flips=5e-3,  # with 8,192 products it flips more roundings
    )


# [N, K] of QKV and o of a sliding and a full layer, of gate/up and down, in 26B-A4B
LAYERS = ((8192, 2816), (9216, 2816), (2816, 4096), (2816, 8192), (4224, 2816), (2816, 2112))
CASES = (
    case(1, 48, 64),
    case(37, 40, 24),
    case(70, 132, 100),
    case(1, 48, 64, operation=op.linear),
    case(1, 13, 100, operation=op.linear),
    case(1, 21, 2112, operation=op.linear),
    *(
        case(count, outputs, inputs, full_size=True, operation=op.linear)
        for outputs, inputs in LAYERS
        for count in (1, 8, 32, 64)
    ),
    case(1, 262144, 2816, full_size=True, operation=op.linear),
    # rows, outputs and inputs that fill no tile
    case(2, 2816, 2112, full_size=True, operation=op.linear),
    case(13, 4200, 2824, full_size=True, operation=op.linear),
    case(43, 8200, 2056, full_size=True, operation=op.linear),
    case(1, 8192, 2816, full_size=True),
    case(64, 8192, 2816, full_size=True),
    case(8192, 8192, 2816, full_size=True),
)
