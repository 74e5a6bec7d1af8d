"""Angles of the layer kinds, at positions up to the longest context."""

from __future__ import annotations

from typing import Any

import torch

from gemcut.kernels.case import Case, MakeInputs
from gemcut.kernels.rope.op import rope_table


def _inputs(count: int, angles: int, theta: float, head: int, ids: torch.dtype) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        positions = torch.randint(262144, (count,), generator=generator, device=device, dtype=ids)
        positions[0] = 262143
        exponent = torch.arange(angles, dtype=torch.float32, device=device) * 2 / head
        return {"positions": positions, "inv_freq": 1 / theta**exponent, "dtype": dtype}

    return make


def _case(
    count: int, angles: int, theta: float, head: int, ids: torch.dtype = torch.int64, full_size: bool = False
) -> Case:
    return Case(
        name=f"T={count} A={angles}",
        operation=rope_table,
        make_inputs=_inputs(count, angles, theta, head, ids),
        outputs=("table",),
        bytes=count * (8 + 4 * angles) + 4 * angles,
        full_size=full_size,
        numerics=("reference",),
    )


CASES = (
    _case(1, 8, 1e4, 16),
    _case(7, 4, 1e6, 32, ids=torch.int32),
    _case(9, 18, 100.0, 36),
    *(_case(count, 128, 1e4, 256, full_size=True) for count in (1, 64, 8192)),
    _case(8192, 64, 1e6, 512, full_size=True),
)
