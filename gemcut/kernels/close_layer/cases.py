"""Sizes of close_layer and close_layer_moe: tiny ones, and the streams of 26B-A4B and 31B."""

from __future__ import annotations

from typing import Any

import torch

from gemcut.kernels.case import Case, MakeInputs, normal
from gemcut.kernels.close_layer.op import close_layer, close_layer_moe

EPS = 1e-6
SMALL = ((1, 48), (3, 128), (5, 2816), (2, 5376))


def _inputs(count: int, hidden: int) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        draw = normal(generator, device, dtype)
        d = draw(count, hidden, scale=30.0)
        if count > 1:
            d[-1] = float("nan")  # a row of padding
        return {
            "x": draw(count, hidden, scale=2.0),
            "d": d,
            "post_weight": draw(hidden, scale=0.3, shift=1.0),
            "layer_scalar": draw(1, scale=0.1, shift=0.6),
            "next_weight": draw(hidden, scale=0.3, shift=1.0),
            "eps": EPS,
        }

    return make


def _moe_inputs(count: int, hidden: int, top_k: int) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        draw = normal(generator, device, dtype)
        weights = torch.rand(count, top_k, generator=generator, device=device) / top_k
        return _inputs(count, hidden)(generator, device, dtype) | {
            "t": draw(count, top_k, hidden, scale=5.0),
            "expert_weights": weights,
            "dense_weight": draw(hidden, scale=0.3, shift=1.0),
            "moe_weight": draw(hidden, scale=0.3, shift=1.0),
        }

    return make


def _case(count: int, hidden: int, full_size: bool) -> Case:
    return Case(
        name=f"T={count} H={hidden}",
        operation=close_layer,
        make_inputs=_inputs(count, hidden),
        outputs=("x", "h"),
        bytes=2 * hidden * (4 * count + 2),
        full_size=full_size,
    )


def _moe_case(count: int, hidden: int, top_k: int, full_size: bool) -> Case:
    return Case(
        name=f"T={count} H={hidden} K={top_k}",
        operation=close_layer_moe,
        make_inputs=_moe_inputs(count, hidden, top_k),
        outputs=("x", "h"),
        bytes=2 * hidden * ((4 + top_k) * count + 4) + 4 * count * top_k,
        full_size=full_size,
    )


CASES = (
    *(_case(count, hidden, False) for count, hidden in SMALL),
    *(_case(count, hidden, True) for count, hidden in ((1, 5376), (64, 2816), (8192, 2816), (4096, 5376))),
    *(_moe_case(count, hidden, 2, False) for count, hidden in SMALL[:2]),
    _moe_case(3, 2816, 8, False),
    *(_moe_case(count, 2816, 8, True) for count in (1, 64, 8192)),
)
