"""Per-layer inputs: tiny ones, and those of E2B and E4B."""

from __future__ import annotations

from typing import Any

import torch

from gemcut.kernels.case import Case, MakeInputs, normal
from gemcut.kernels.per_layer.op import add_normed, gate_per_layer, per_layer_inputs

EPS = 1e-6


def _inputs(count: int, hidden: int, layers: int, width: int, vocab: int, soft: bool) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        draw = normal(generator, device, dtype)
        projected = draw(count, layers * width, scale=hidden**0.5)
        soft_rows = None
        if soft:
            soft_rows = torch.where(torch.arange(count, device=device) % 3 == 1, 0, -1)
        if count > 1:
            projected[-1] = float("nan")  # a row of padding
        return {
            "projected": projected,
            "token_ids": torch.randint(vocab, (count,), generator=generator, device=device),
            "weight": draw(vocab, layers * width, scale=width**-0.5),
            "soft_rows": soft_rows,
            "norm_weight": draw(width, scale=0.3, shift=1.0),
            "hidden": hidden,
            "pad_id": 0,
            "eps": EPS,
        }

    return make


def _case(
    count: int,
    hidden: int,
    layers: int,
    width: int,
    vocab: int,
    soft: bool = False,
    full_size: bool = False,
) -> Case:
    total = layers * width
    return Case(
        name=f"T={count} H={hidden} L={layers} W={width}{' soft' * soft}",
        operation=per_layer_inputs,
        make_inputs=_inputs(count, hidden, layers, width, vocab, soft),
        outputs=("inputs",),
        bytes=2 * total * 3 * count + 8 * count * (1 + soft) + 2 * width,
        full_size=full_size,
    )


def _add_inputs(count: int, hidden: int) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        draw = normal(generator, device, dtype)
        d = draw(count, hidden, scale=30.0)
        if count > 1:
            d[-1] = float("nan")  # a row of padding
        x = draw(count, hidden, scale=2.0)
        return {"x": x, "d": d, "post_weight": draw(hidden, scale=0.3, shift=1.0), "eps": EPS}

    return make


def _add_case(count: int, hidden: int, full_size: bool = False) -> Case:
    return Case(
        name=f"T={count} H={hidden}",
        operation=add_normed,
        make_inputs=_add_inputs(count, hidden),
        outputs=("x",),
        bytes=2 * hidden * (3 * count + 1),
        full_size=full_size,
    )


def _gate_inputs(count: int, width: int) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        draw = normal(generator, device, dtype)
        gate = draw(count, width)
        if count > 1:
            gate[-1] = float("nan")  # a row of padding
            gate[0, 0], gate[0, 1] = 60.0, -60.0  # far into both tails
        return {"gate": gate, "inputs": draw(count, width)}

    return make


def _gate_case(count: int, width: int, full_size: bool = False) -> Case:
    return Case(
        name=f"T={count} W={width}",
        operation=gate_per_layer,
        make_inputs=_gate_inputs(count, width),
        outputs=("gated",),
        bytes=2 * 3 * count * width,
        full_size=full_size,
        flips=1e-2,  # torch's 1 + tanh cancels in the left tail, the kernel's sigmoid does not
    )


CASES = (
    _case(1, 48, 3, 16, 50),
    _case(5, 48, 3, 24, 50, soft=True),
    _case(4, 1536, 35, 256, 50, soft=True),
    *(_case(count, 1536, 35, 256, 2048, soft=True, full_size=True) for count in (1, 64, 4096)),
    _case(4096, 2560, 42, 256, 2048, soft=True, full_size=True),
    *(_add_case(count, hidden) for count, hidden in ((1, 48), (3, 1536))),
    *(_add_case(count, 1536, full_size=True) for count in (1, 64, 8192)),
    _add_case(8192, 2560, full_size=True),
    *(_gate_case(count, width) for count, width in ((1, 24), (5, 256))),
    *(_gate_case(count, 256, full_size=True) for count in (1, 64, 8192)),
)
