"""Few tokens and many, experts with no rows and with nearly all, widths that fill no tile, padding."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional

from gemcut.kernels.backend import Backend
from gemcut.kernels.case import Case
from gemcut.kernels.experts import op
from gemcut.kernels.router.op import Routing


def route(
    generator: torch.Generator,
    device: torch.device,
    tokens: int,
    padding: int,
    experts: int,
    top_k: int,
    even: bool,
) -> Routing:
    """Every expert equally likely; unless even, the first half of the tokens all take expert 1."""
    total = tokens + padding
    likely = torch.rand(total, experts, generator=generator, device=device)
    if not even:
        likely[: tokens // 2, 1] = 2
    chosen = likely.topk(top_k).indices
    flat = chosen.clone()
    flat[tokens:] = experts
    counts = torch.bincount(flat.flatten(), minlength=experts + 1)[:-1]
    return Routing(
        weights=torch.rand(total, top_k, generator=generator, device=device),
        experts=chosen,
        order=flat.flatten().argsort(stable=True),
        offsets=functional.pad(counts.cumsum(0), (1, 0)),
    )


def make_inputs(
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    *,
    glu: bool,
    tokens: int,
    padding: int,
    hidden: int,
    width: int,
    experts: int,
    top_k: int,
    even: bool,
) -> dict[str, Any]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    routing = route(generator, device, tokens, padding, experts, top_k, even)
    if glu:
        x, weight = normal(tokens + padding, hidden), normal(experts, 2 * width, hidden)
        x[tokens:] = float("nan")
        return {"h": x, "gate_up": weight.mul_(hidden**-0.5), "routing": routing, "real": tokens}
    x, weight = normal((tokens + padding) * top_k, width), normal(experts, hidden, width)
    x[tokens * top_k :] = float("nan")
    return {"m": x, "down": weight.mul_(width**-0.5), "routing": routing, "real": tokens}


def grouped_glu(
    h: torch.Tensor, gate_up: torch.Tensor, routing: Routing, *, real: int, backend: Backend
) -> torch.Tensor:
    """The operation without the rows of padding, which it leaves as they come."""
    return op.grouped_glu(h, gate_up, routing, backend=backend)[: real * routing.experts.shape[1]]


def grouped_linear(
    m: torch.Tensor, down: torch.Tensor, routing: Routing, *, real: int, backend: Backend
) -> torch.Tensor:
    return op.grouped_linear(m, down, routing, backend=backend)[:real]


def case(
    tokens: int,
    *,
    glu: bool,
    padding: int = 0,
    hidden: int = 48,
    width: int = 40,
    experts: int = 8,
    top_k: int = 2,
    full_size: bool = False,
) -> Case:
    pairs = tokens * top_k
    touched = experts * (1 - (1 - top_k / experts) ** tokens)  # expected
    rows, columns = (2 * width, hidden) if glu else (hidden, width)
    ends = tokens * hidden + pairs * width if glu else pairs * (width + hidden)
    return Case(
        name=f"T={tokens}+{padding} H={hidden} I={width} E={experts}",
        operation=grouped_glu if glu else grouped_linear,
        make_inputs=partial(
            make_inputs,
            glu=glu,
            tokens=tokens,
            padding=padding,
            hidden=hidden,
            width=width,
            experts=experts,
            top_k=top_k,
            even=full_size,
        ),
        outputs=("m" if glu else "t",),
        bytes=int(2 * (touched * rows * columns + ends)),
        flops=2 * pairs * rows * columns,
        full_size=full_size,
        numerics=("reference", "fused") if glu else ("reference",),
        flips=2e-2 if glu else 2e-3,  # sums in another order; a flipped gate moves the two roundings after it
        capturable_reference=False,
    )


CASES = tuple(
    made
    for glu in (True, False)
    for made in (
        case(1, glu=glu),
        case(3, glu=glu, padding=5),
        case(12, glu=glu, padding=5),
        case(70, glu=glu, padding=2),
        case(33, glu=glu, experts=3, top_k=1, hidden=64, width=64),
        case(33, glu=glu, experts=3, top_k=1, hidden=96, width=32),
        case(9, glu=glu, experts=5, top_k=3, hidden=40, width=24),
    )
) + tuple(
    case(tokens, glu=glu, hidden=2816, width=704, experts=128, top_k=8, full_size=True)
    for glu in (True, False)
    for tokens in (1, 2, 8, 16, 32, 64, 256, 1024, 2048, 4096, 8192)
)
