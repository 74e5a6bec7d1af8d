"""Sizes of add_norm and add_norm_moe: tiny ones, and the streams of 26B-A4B, 31B and the vision tower."""

from __future__ import annotations

from typing import Any

import torch

from gemcut.kernels.add_norm.op import add_norm, add_norm_moe
from gemcut.kernels.case import Case, MakeInputs, normal

EPS = 1e-6
SMALL = ((1, 48), (3, 128), (5, 2816), (2, 5376))
FULL = ((1, 2816), (64, 2816), (8192, 2816), (4096, 5376), (2520, 1152))


def _inputs(count: int, hidden: int, weights: tuple[str, ...]) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        draw = normal(generator, device, dtype)
        inputs: dict[str, Any] = {"x": draw(count, hidden, scale=2.0), "a": draw(count, hidden, scale=30.0)}
        if count > 1:
            inputs["a"][-1] = float("nan")  # a row of padding
        return inputs | {name: draw(hidden, scale=0.3, shift=1.0) for name in weights} | {"eps": EPS}

    return make


def _case(count: int, hidden: int, full_size: bool) -> Case:
    return Case(
        name=f"T={count} H={hidden}",
        operation=add_norm,
        make_inputs=_inputs(count, hidden, ("post_weight", "next_weight")),
        outputs=("x1", "h"),
        bytes=2 * hidden * (4 * count + 2),
        full_size=full_size,
    )


def _moe_case(count: int, hidden: int, full_size: bool) -> Case:
    names = ("post_weight", "next_weight", "router_scale", "expert_weight")
    return Case(
        name=f"T={count} H={hidden}",
        operation=add_norm_moe,
        make_inputs=_inputs(count, hidden, names),
        outputs=("x1", "h", "r", "e"),
        bytes=2 * hidden * (6 * count + 4),
        full_size=full_size,
    )


CASES = (
    *(_case(count, hidden, False) for count, hidden in SMALL),
    *(_case(count, hidden, True) for count, hidden in FULL),
    *(_moe_case(count, hidden, False) for count, hidden in SMALL),
    *(_moe_case(count, hidden, True) for count, hidden in FULL[:3]),
)
