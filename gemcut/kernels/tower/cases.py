"""Sizes of the tower's segments: tiny ones, and one picture of 280 soft tokens in the tower of 26B-A4B."""

from __future__ import annotations

from typing import Any

import torch

from gemcut.kernels.backend import Backend
from gemcut.kernels.case import Case, MakeInputs, normal
from gemcut.kernels.rope.op import rope_table
from gemcut.kernels.tower.op import add_positions, pool_patches, prepare_tower_qkv, scale_patches

EPS = 1e-6


def _scale_inputs(count: int) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        pixels = torch.randint(
            256, (count, 768), generator=generator, device=device, dtype=torch.int32
        ).byte()
        pixels[0, :256] = torch.arange(256, device=device)
        return {"pixels": pixels, "dtype": dtype}

    return make


def _scale_case(count: int, full_size: bool = False) -> Case:
    return Case(
        name=f"N={count}",
        operation=scale_patches,
        make_inputs=_scale_inputs(count),
        outputs=("patches",),
        exact=("patches",),
        bytes=3 * 768 * count,
        full_size=full_size,
        numerics=("reference",),
        capturable_reference=False,  # it copies its table to the device
    )


def _positions_inputs(count: int, hidden: int, places: int, ids: torch.dtype) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        draw = normal(generator, device, dtype)
        return {
            "x": draw(count, hidden),
            "table": draw(2, places, hidden),
            "positions": torch.randint(places, (count, 2), generator=generator, device=device, dtype=ids),
            "next_weight": draw(hidden, scale=0.3, shift=1.0),
            "eps": EPS,
        }

    return make


def _positions_case(
    count: int, hidden: int, places: int, ids: torch.dtype = torch.int64, full_size: bool = False
) -> Case:
    return Case(
        name=f"N={count} H={hidden}",
        operation=add_positions,
        make_inputs=_positions_inputs(count, hidden, places, ids),
        outputs=("x", "h"),
        bytes=2 * hidden * (3 * count + 2 * min(places, count) + 1) + 2 * ids.itemsize * count,
        full_size=full_size,
    )


def _qkv_inputs(count: int, heads: int, head: int) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        draw = normal(generator, device, dtype)
        exponent = torch.arange(head // 4, dtype=torch.float32, device=device) * 4 / head
        ropes = [
            rope_table(
                torch.randint(120, (count,), generator=generator, device=device),
                1 / 100**exponent,
                dtype,
                backend=Backend(),
            )
            for _ in range(2)
        ]
        qkv = draw(count, 3 * heads * head, scale=5.0)
        if count > 1:
            qkv[-1] = float("nan")  # a patch of padding
        return {
            "qkv": qkv,
            "q_norm": draw(head, scale=0.3, shift=1.0),
            "k_norm": draw(head, scale=0.3, shift=1.0),
            "x_rope": ropes[0],
            "y_rope": ropes[1],
            "eps": EPS,
        }

    return make


def _qkv_case(count: int, heads: int, head: int, full_size: bool = False) -> Case:
    return Case(
        name=f"N={count} heads={heads} D={head}",
        operation=prepare_tower_qkv,
        make_inputs=_qkv_inputs(count, heads, head),
        outputs=("q", "k", "v"),
        bytes=2 * count * (6 * heads * head + head),
        full_size=full_size,
    )


def _pool_inputs(count: int, tokens: int, hidden: int, standardize: bool, ids: torch.dtype) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        draw = normal(generator, device, dtype)
        return {
            "x": draw(count, hidden, scale=2.0),
            "cells": torch.randperm(count, generator=generator, device=device)[: 9 * tokens]
            .view(tokens, 9)
            .to(ids),
            "starts": torch.tensor([0, count], dtype=torch.int32, device=device),
            "std_bias": draw(hidden, scale=3.0) if standardize else None,
            "std_scale": draw(hidden, scale=0.2, shift=1.0) if standardize else None,
            "eps": EPS,
        }

    return make


def _pool_case(
    tokens: int, hidden: int, standardize: bool, ids: torch.dtype = torch.int64, full_size: bool = False
) -> Case:
    return Case(
        name=f"S={tokens} H={hidden} standardize={standardize}",
        operation=pool_patches,
        make_inputs=_pool_inputs(9 * tokens, tokens, hidden, standardize, ids),
        outputs=("features",),
        bytes=2 * hidden * (10 * tokens + (2 if standardize else 0)) + 9 * ids.itemsize * tokens,
        full_size=full_size,
        capturable_reference=False,  # it reads the pictures' bounds
        flips=1e-2,  # ninths of bf16 values often sum to a tie, which the order of summation decides
    )


CASES = (
    _scale_case(3),
    _scale_case(2520, full_size=True),
    _positions_case(5, 32, 20),
    _positions_case(3, 1152, 50, ids=torch.int32),
    _positions_case(2520, 1152, 10240, full_size=True),
    _qkv_case(1, 4, 8),
    _qkv_case(5, 4, 8),
    _qkv_case(3, 12, 64),
    _qkv_case(3, 16, 72),
    _qkv_case(2520, 16, 72, full_size=True),
    _qkv_case(20160, 16, 72, full_size=True),
    _pool_case(3, 32, False, ids=torch.int32),
    _pool_case(3, 1152, True),
    _pool_case(280, 1152, True, full_size=True),
)
