"""Head shapes of prepare_qkv and prepare_q: tiny ones, and S and F layers of the released sizes."""

from __future__ import annotations

from typing import Any

import torch

from gemcut.kernels.backend import Backend
from gemcut.kernels.case import Case, MakeInputs, normal
from gemcut.kernels.prepare_qkv.op import prepare_q, prepare_qkv
from gemcut.kernels.rope.op import rope_table

PAGE = 16


def _inputs(count: int, q_heads: int, kv_heads: int, head: int, angles: int, k_eq_v: bool) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        draw = normal(generator, device, dtype)
        pages = -(-count // PAGE) + 1
        slots = torch.randperm(pages * PAGE, generator=generator, device=device)[:count]
        qkv = draw(count, (q_heads + (1 if k_eq_v else 2) * kv_heads) * head, scale=5.0)
        if count > 2:  # padding: not written, whatever is in it
            slots[-2:] = -1
            qkv[-2:] = float("nan")
        return {
            "qkv": qkv,
            "q_norm": draw(head, scale=0.3, shift=1.0),
            "k_norm": draw(head, scale=0.3, shift=1.0),
            "rope": _rope(count, head, angles, generator, device, dtype),
            "slots": slots,
            "k_pages": draw(pages, PAGE, kv_heads, head),
            "v_pages": draw(pages, PAGE, kv_heads, head),
            "q_heads": q_heads,
            "eps": 1e-6,
        }

    return make


def _case(
    name: str,
    count: int,
    q_heads: int,
    kv_heads: int,
    head: int,
    angles: int,
    k_eq_v: bool = False,
    full_size: bool = False,
) -> Case:
    read = q_heads + (1 if k_eq_v else 2) * kv_heads
    return Case(
        name=f"{name} T={count}",
        operation=prepare_qkv,
        make_inputs=_inputs(count, q_heads, kv_heads, head, angles, k_eq_v),
        outputs=("q",),
        writes=("k_pages", "v_pages"),
        bytes=2 * count * (head * (read + q_heads + 2 * kv_heads) + 2 * angles) + 8 * count + 4 * head,
        full_size=full_size,
        capturable_reference=False,  # it drops padding rows by their indices, which wait for the device
    )


def _rope(
    count: int,
    head: int,
    angles: int,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    positions = torch.randint(262144, (count,), generator=generator, device=device)
    exponent = torch.arange(angles, dtype=torch.float32, device=device) * 2 / head
    return rope_table(positions, 1 / 1e4**exponent, torch.float32, backend=Backend()).to(dtype)


def _q_inputs(count: int, q_heads: int, head: int, angles: int) -> MakeInputs:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        draw = normal(generator, device, dtype)
        q = draw(count, q_heads * head, scale=5.0)
        if count > 2:
            q[-2:] = float("nan")  # padding
        return {
            "q": q,
            "q_norm": draw(head, scale=0.3, shift=1.0),
            "rope": _rope(count, head, angles, generator, device, dtype),
            "eps": 1e-6,
        }

    return make


def _q_case(name: str, count: int, q_heads: int, head: int, angles: int, full_size: bool = False) -> Case:
    return Case(
        name=f"{name} T={count}",
        operation=prepare_q,
        make_inputs=_q_inputs(count, q_heads, head, angles),
        outputs=("q",),
        bytes=4 * count * (head * q_heads + angles) + 2 * head,
        full_size=full_size,
    )


CASES = (
    _case("tiny S", 1, 4, 2, 16, 8),
    _case("tiny S", 7, 4, 2, 16, 8),
    _case("tiny F", 5, 4, 1, 32, 4, k_eq_v=True),
    _case("demo", 4, 3, 3, 64, 32),
    _case("26B S", 3, 16, 8, 256, 128),
    _case("26B F", 3, 16, 2, 512, 64, k_eq_v=True),
    _case("E2B F", 3, 8, 1, 512, 64),
    *(_case("26B S", count, 16, 8, 256, 128, full_size=True) for count in (1, 64, 8192)),
    *(_case("26B F", count, 16, 2, 512, 64, k_eq_v=True, full_size=True) for count in (1, 64, 8192)),
    _case("31B S", 4096, 32, 16, 256, 128, full_size=True),
    _case("12B F", 4096, 16, 1, 512, 64, k_eq_v=True, full_size=True),
    _q_case("tiny", 1, 3, 16, 8),
    _q_case("E2B S", 5, 8, 256, 128),
    *(_q_case("E2B S", count, 8, 256, 128, full_size=True) for count in (1, 64, 8192)),
    *(_q_case("E2B F", count, 8, 512, 64, full_size=True) for count in (1, 64, 8192)),
)
