"""Widths of glu: tiny ones, the dense MLP of 26B-A4B and 31B, the vision tower."""

from __future__ import annotations

from typing import Any

import torch

from gemcut.kernels.case import Case, MakeInputs, normal
from gemcut.kernels.glu.op import glu


def _inputs(count: int, width: int) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        gate_up = normal(generator, device, dtype)(count, 2 * width)
        if count > 1:
            gate_up[-1] = float("nan")  # a row of padding
            gate_up[0, 0], gate_up[0, 1] = 60.0, -60.0  # far into both tails
        return {"gate_up": gate_up}

    return make


def _case(count: int, width: int, full_size: bool) -> Case:
    return Case(
        name=f"T={count} I={width}",
        operation=glu,
        make_inputs=_inputs(count, width),
        outputs=("m",),
        bytes=2 * 3 * count * width,
        full_size=full_size,
        flips=1e-2,  # torch's 1 + tanh cancels in the left tail, the kernel's sigmoid does not
    )


CASES = (
    *(_case(count, width, False) for count, width in ((1, 24), (5, 96), (3, 2112), (2, 4304))),
    *(
        _case(count, width, True)
        for count, width in ((1, 2112), (64, 2112), (8192, 2112), (2048, 21504), (2520, 4304))
    ),
)
